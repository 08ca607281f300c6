// The load of the layer that colours: a bar for each expert in its colour, which is the legend too; and all layers in
// numbers. A bar is a button: it puts its expert in the light.

import { byId, el } from "../core/dom.js";
import { number, percent, t } from "../core/language.js";
import { balance, rowsOf } from "./balance.js";
import { lens, look, paint } from "./lens.js";

const FIGURES = ["used", "entropy", "effective", "maxOverMean"];

export class LoadView {
  #bars = [];

  constructor() {
    byId("layers").addEventListener("toggle", () => this.update(this.data));
    byId("load").addEventListener("click", (event) => {
      const bar = event.target.closest("button");
      if (!bar) return;
      const expert = Number(bar.dataset.number);
      look({ spotlight: lens.value.spotlight === expert ? null : expert }, true);
    });
  }

  /** Shows {layers, width, visits}, or nothing. */
  update(data) {
    this.data = data;
    const { place } = lens.value;
    const rows = data ? rowsOf(data.visits, data.layers, data.width) : [];
    const row = rows[place] ?? [];
    const layer = data?.layers[place]?.layer;
    byId("load-title").textContent = layer === undefined ? t("loadTitleEmpty") : t("loadTitle", { layer });
    byId("load-figures").textContent = row.length ? t("loadFigures", written(balance(row), row.length)) : "";
    this.#showBars(row);
    if (byId("layers").open) byId("layers").querySelector(".scroll").replaceChildren(table(data, rows));
  }

  #showBars(row) {
    if (this.#bars.length !== row.length) {
      this.#bars = row.map((_, expert) => bar(expert));
      byId("load").replaceChildren(...this.#bars.map(({ node }) => node));
    }
    const most = Math.max(...row, 1);
    const total = row.reduce((sum, count) => sum + count, 0) || 1;
    for (const [expert, { node, fill }] of this.#bars.entries()) {
      fill.style.height = `${(100 * row[expert]) / most}%`;
      const name = t("loadBar", { expert, visits: number(row[expert]), share: percent(row[expert] / total) });
      node.ariaLabel = name;
      node.title = name;
      node.ariaPressed = String(lens.value.spotlight === expert);
    }
  }
}

function bar(expert) {
  const fill = el("i");
  const well = el("span", { className: "well" }, fill);
  const node = el("button", { type: "button", className: "bar" }, well, String(expert));
  paint(node, expert);
  return { node, fill };
}

function written({ total, used, entropy, effective, maxOverMean }, experts) {
  const one = { minimumFractionDigits: 1, maximumFractionDigits: 1 };
  const two = { minimumFractionDigits: 2, maximumFractionDigits: 2 };
  return {
    visits: number(total),
    used: `${used}/${experts}`,
    entropy: number(entropy, two),
    largest: number(Math.log2(experts), two),
    effective: number(effective, one),
    maxOverMean: number(maxOverMean, one),
  };
}

function table(data, rows) {
  const head = el("tr", {}, el("th", { t: "layer" }), ...FIGURES.map((name) => el("th", { t: `figure.${name}` })));
  const body = rows.map((row, place) => {
    const figures = written(balance(row), row.length);
    const name = String(data.layers[place].layer);
    const choose = el("button", { type: "button", className: "quiet", on: { click: () => look({ place }, true) } }, name);
    const cells = FIGURES.map((figure) => el("td", {}, figures[figure]));
    return el("tr", { className: place === lens.value.place ? "chosen" : "" }, el("th", {}, choose), ...cells);
  });
  return el("table", {}, el("thead", {}, head), el("tbody", {}, ...body));
}
