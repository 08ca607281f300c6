// What the conversation cost in arithmetic: tokens times the server's GFLOP a token, beside what two other models would
// have spent on as many tokens. Answers on other branches were computed too, so they count.

import { byId, el } from "../core/dom.js";
import { flop, number, t } from "../core/language.js";

const MODELS = ["own", "dense", "llama"];

/** Tokens that the server computed for a conversation; of an answer on its way, those that came. */
export function computedTokens(conversation) {
  const count = ({ usage, surfaces }) => usage.read + Math.max(usage.written, surfaces.length);
  return conversation.answers().reduce((sum, answer) => sum + count(answer), 0);
}

export function showMeter(info, conversation) {
  const tokens = computedTokens(conversation);
  const most = Math.max(...MODELS.map((model) => info.gflop[model]));
  const rows = MODELS.map((model) => {
    const fill = el("i");
    fill.style.width = tokens ? `${(100 * info.gflop[model]) / most}%` : "0";
    const spent = flop(tokens * info.gflop[model]);
    const name = t(`meter.${model}`, { model: info.model });
    const row = el("div", { className: "meter-row", data: { model } }, el("span", {}, name), el("b", {}, spent));
    row.append(el("span", { className: "well" }, fill));
    return row;
  });
  byId("meter").replaceChildren(...rows, el("p", { className: "note" }, note(info, tokens)));
}

function note({ gflop, model }, tokens) {
  const times = (other) => number(gflop[other] / gflop.own, { maximumSignificantDigits: 2 });
  const values = { tokens: number(tokens), model, own: flop(gflop.own), dense: times("dense"), llama: times("llama") };
  return t("meterNote", values);
}
