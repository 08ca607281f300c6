// How an answer ended when it did not simply end: what happened in words, what to do, and the server's own words.

import { el, icon } from "../core/dom.js";
import { has, language, number, t } from "../core/language.js";

/** What a kind of error offers: the strings are `error.<kind>` and `advice.<kind>`. */
const OFFERS = {
  unreachable: ["retry"],
  dropped: ["goOn", "retry"],
  key: ["enterKey", "retry"],
  busy: ["retry"],
  context: ["leaveOut", "newConversation"],
  request: ["openSettings", "retry"],
  slow: ["goOn", "retry"],
  server: ["goOn", "retry"],
};

/** The notes under an answer; `active` says whether something can be done about it here. */
export function problem(message, actions, active) {
  const { status, finish, content } = message;
  if (status === "failed" || status === "dropped") return [card(message, actions, active)];
  const { full, older } = actions.room(message);
  const cut = status === "stopped" || (finish === "length" && status === "done");
  if (!cut && !(full && active)) return [];
  const note = status === "stopped" ? "stopped" : full ? "contextFull" : "lengthReached";
  const offers = full ? [...(older ? ["leaveOut"] : []), "newConversation"] : content ? ["goOn"] : [];
  const buttons = active ? offers.map((offer) => button(offer, message, actions)) : [];
  return [el("p", { className: "ended" }, el("span", { t: note }), ...buttons)];
}

function card(message, actions, active) {
  const error = message.error ?? { kind: "dropped" };
  const kind = error.kind in OFFERS ? error.kind : "server";
  const told = el("div", {}, el("strong", { t: `error.${kind}` }), el("p", {}, advice(kind, error)));
  told.append(...words(error));
  const { full, older } = actions.room(message);
  // What was said is needed to go on from it, and room; turns can be left out where there are older ones.
  const possible = { goOn: message.content && !full, leaveOut: older };
  const offers = OFFERS[kind].filter((offer) => possible[offer] ?? true);
  const buttons = offers.map((offer) => button(offer, message, actions));
  if (active) told.append(el("div", { className: "offers" }, ...buttons));
  return el("div", { className: "problem", role: "alert" }, icon("alert"), told);
}

/**
 * The server's words, which are English. Where its code says the same in the reader's language, that is written, and the
 * server's own sentence, with its numbers, is one click away.
 */
function words({ message, code }) {
  if (!message) return [];
  const own = el("p", { className: "server-words", lang: "en" }, message);
  if (language.value === "en" || !has(`code.${code}`)) return [own];
  const details = el("details", {}, el("summary", { t: "serverWords" }), own);
  return [el("p", { t: `code.${code}` }), details];
}

function advice(kind, { retryAfterS, param, values }) {
  if (kind === "context" && values) {
    return t("advice.contextFull", { tokens: number(values.tokens), limit: number(values.limit) });
  }
  if (kind === "busy" && retryAfterS) return t("advice.busyFor", { seconds: number(retryAfterS) });
  if (kind === "request" && param) return t("advice.requestParam", { param: has(`setting.${param}`) ? t(`setting.${param}`) : param });
  return t(`advice.${kind}`);
}

function button(offer, message, actions) {
  const className = ["goOn", "retry", "leaveOut"].includes(offer) ? "" : "quiet";
  const click = () => actions[offer](message);
  return el("button", { type: "button", className, t: `offer.${offer}`, on: { click } });
}
