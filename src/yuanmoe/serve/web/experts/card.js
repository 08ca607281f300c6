// What a token did: its text, how likely it was, and its experts with their weights in every layer.

import { byId, el } from "../core/dom.js";
import { percent, t } from "../core/language.js";
import { lens, paint } from "./lens.js";

const GAP = 8;
const ROWS = 12;

export function hideCard() {
  byId("token-card").hidden = true;
  document.querySelector('[aria-describedby="token-card"]')?.removeAttribute("aria-describedby");
}

export const cardIsShown = () => !byId("token-card").hidden;

/** Shows the card of a token beside its node. */
export function showCard({ message, at, node }) {
  hideCard();
  const card = byId("token-card");
  card.replaceChildren(head(message, at), table(message.routing, at));
  card.hidden = false;
  node.setAttribute("aria-describedby", "token-card");
  moveBeside(card, node.getClientRects()[0] ?? node.getBoundingClientRect());
}

function head(message, at) {
  const logprob = message.logprobs[at];
  const text = message.surfaces[at].replaceAll("\n", "\u21b5").replaceAll(" ", "\u2423");
  const likely = Number.isFinite(logprob) ? t("likelihood", { percent: percent(Math.exp(logprob)) }) : "";
  return el("p", { className: "card-head" }, el("b", {}, text || t("partOfCharacter")), el("span", {}, likely));
}

function table(routing, at) {
  if (at >= routing.length) return el("p", { className: "note" }, t("notReadYet"));
  const rows = routing.layers.map(({ layer }, place) => row(layer, routing.of(at, place), place === lens.value.place));
  const list = el("ol", { className: "ways" }, ...rows);
  // Column after column, as many as keep the card low.
  list.style.gridTemplateRows = `repeat(${Math.ceil(rows.length / Math.ceil(rows.length / ROWS))}, auto)`;
  return list;
}

function row(layer, visited, chosen) {
  const experts = visited.map(({ expert, weight }) => {
    const name = el("b", { className: "swatch" }, String(expert));
    paint(name, expert);
    return el("span", {}, name, ` ${percent(weight, 0)}`);
  });
  return el("li", { className: chosen ? "chosen" : "" }, el("span", {}, t("layerShort", { layer })), ...experts);
}

/** Above or below, where there is room, and inside the window. */
function moveBeside(card, box) {
  const { offsetWidth: width, offsetHeight: height } = card;
  const below = box.bottom + GAP + height < innerHeight || box.top < height + GAP;
  const top = below ? Math.min(box.bottom + GAP, innerHeight - height - GAP) : box.top - height - GAP;
  card.style.left = `${Math.max(GAP, Math.min(box.left, innerWidth - width - GAP))}px`;
  card.style.top = `${Math.max(GAP, top)}px`;
}
