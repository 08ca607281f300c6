// The quiet line under an answer: how many tokens, how fast, when the first came, and whether it ended by itself.

import { el } from "../core/dom.js";
import { number, t } from "../core/language.js";

/** The line; null while nothing was written. */
export function facts({ status, finish, surfaces, timing }) {
  if (!surfaces.length) return null;
  const said = [t("facts.tokens", { tokens: number(surfaces.length) })];
  const three = { maximumSignificantDigits: 3 };
  if (timing?.writeS > 0) said.push(t("facts.speed", { rate: number(timing.tokens / timing.writeS, three) }));
  if (timing?.firstS) said.push(t("facts.first", { seconds: number(timing.firstS, three) }));
  if (status === "done" && finish !== "length") said.push(t("facts.complete"));
  return el("p", { className: "facts" }, said.join(" \u00b7 "));
}
