// How an answer ended when it did not simply end: what happened in words, what to do, and the server's own words.

import { el, icon } from "../core/dom.js";
import { number, t } from "../core/language.js";

/** What a kind of error offers: the strings are `error.<kind>` and `advice.<kind>`. */
const OFFERS = {
  unreachable: ["retry"],
  dropped: ["goOn", "retry"],
  key: ["enterKey", "retry"],
  busy: ["retry"],
  context: ["newConversation", "openSettings"],
  request: ["openSettings", "retry"],
  slow: ["goOn", "retry"],
  server: ["goOn", "retry"],
};

/** The notes under an answer; `active` says whether something can be done about it here. */
export function problem(message, actions, active) {
  const { status, finish, content } = message;
  if (status === "failed" || status === "dropped") return [card(message, actions, active)];
  const note = status === "stopped" ? "stopped" : finish === "length" && status === "done" ? "lengthReached" : null;
  if (!note) return [];
  const offer = active && content ? [button("goOn", message, actions)] : [];
  return [el("p", { className: "ended" }, el("span", { t: note }), ...offer)];
}

function card(message, actions, active) {
  const error = message.error ?? { kind: "dropped" };
  const kind = error.kind in OFFERS ? error.kind : "server";
  const told = el("div", {}, el("strong", { t: `error.${kind}` }), el("p", {}, advice(kind, error)));
  if (error.message) told.append(el("p", { className: "server-words" }, error.message));
  // What was said is needed to go on from it.
  const offers = OFFERS[kind].filter((offer) => offer !== "goOn" || message.content);
  const buttons = offers.map((offer) => button(offer, message, actions));
  if (active) told.append(el("div", { className: "offers" }, ...buttons));
  return el("div", { className: "problem", role: "alert" }, icon("alert"), told);
}

function advice(kind, { retryAfterS, param }) {
  if (kind === "busy" && retryAfterS) return t("advice.busyFor", { seconds: number(retryAfterS) });
  if (kind === "request" && param) return t("advice.requestParam", { param });
  return t(`advice.${kind}`);
}

function button(offer, message, actions) {
  const className = offer === "goOn" || offer === "retry" ? "" : "quiet";
  const click = () => actions[offer](message);
  return el("button", { type: "button", className, t: `offer.${offer}`, on: { click } });
}
