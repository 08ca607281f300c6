// How experts are looked at: the layer that colours, which of a token's experts counts, the expert in the spotlight.

import { byId } from "../core/dom.js";
import { remember, remembered } from "../core/remembered.js";
import { signal } from "../core/signal.js";
import { balance, rowsOf } from "./balance.js";

/** `place` counts layers with experts; `rank` is 0, 1 or `strongest`; `spotlight` an expert or null. */
export const lens = signal({ place: 0, rank: 0, spotlight: null });

/** Whether the reader chose a layer: then the page chooses none. */
let chosen = false;

/** The layer whose experts differ most is where there is most to see; the reader's own choice stays. */
export function lookAtUneven({ layers, width, visits }) {
  if (chosen || !layers.length) return;
  const rows = rowsOf(visits, layers, width).map((row) => balance(row).maxOverMean);
  const place = rows.indexOf(Math.max(...rows));
  if (place !== lens.value.place) look({ place });
}

export function look(change, byReader = false) {
  chosen ||= byReader;
  lens.value = { ...lens.value, ...change };
}

const COLOURS = 32;

/** Gives a node the colour of an expert, and its number. Models with more experts use the colours again. */
export function paint(node, expert) {
  if (expert === null) {
    delete node.dataset.expert;
    delete node.dataset.number;
    return;
  }
  node.dataset.expert = expert % COLOURS;
  node.dataset.number = expert;
}

/** The controls above the transcript. */
export function startLens(session) {
  const layer = byId("layer");
  const rank = byId("rank");
  const numbers = byId("numbers");
  session.info.watch((info) => {
    if (!info?.layers.length) return;
    layer.max = info.layers.length - 1;
    // The middle of the network: past the letters, before the next word.
    look({ place: Math.floor(info.layers.length / 2), spotlight: null });
    for (const option of rank.options) option.disabled = Number(option.value) >= info.chosen;
  });
  lens.watch(({ place }) => {
    layer.value = place;
    byId("layer-name").textContent = session.info.value?.layers[place]?.layer ?? "";
  });
  layer.addEventListener("input", () => look({ place: layer.valueAsNumber }, true));
  rank.addEventListener("change", () => look({ rank: rank.value === "strongest" ? rank.value : Number(rank.value) }));
  numbers.checked = remembered("numbers") ?? false;
  const show = () => {
    document.body.classList.toggle("with-numbers", numbers.checked);
    remember("numbers", numbers.checked);
  };
  numbers.addEventListener("change", show);
  show();
}
