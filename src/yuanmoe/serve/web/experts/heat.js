// The heat map: a row for each layer, a column for each expert, darker where more of the layer's choices went.
// A canvas, because 768 cells change with every token; its values are said cell by cell (arrows) and stand in a table.

import { byId, el } from "../core/dom.js";
import { number, percent, say, t } from "../core/language.js";
import { lens, look } from "./lens.js";

const ROW = 15;
const LEFT = 24;
const BOTTOM = 16;
const SHADES = 48;
const LABEL_EVERY = 4;

export class HeatMap {
  /** Which one is told about; null until one was pointed at. */
  #cell = null;
  #shades = [];
  data = null;

  constructor() {
    this.canvas = byId("heat");
    this.canvas.addEventListener("keydown", (event) => this.#key(event));
    this.canvas.addEventListener("pointermove", (event) => this.#point(event));
    this.canvas.addEventListener("click", (event) => this.#point(event) && this.#choose());
    byId("heat-values").addEventListener("toggle", () => this.#table());
    new ResizeObserver(() => this.draw()).observe(this.canvas.parentElement);
  }

  /** Colours follow the theme. */
  restyle() {
    const probe = document.body.appendChild(el("i", { className: "unseen" }));
    this.#shades = Array.from({ length: SHADES }, (_, at) => {
      probe.style.color = shade(at / (SHADES - 1));
      return getComputedStyle(probe).color;
    });
    probe.style.color = "var(--muted)";
    this.ink = getComputedStyle(probe).color;
    probe.style.color = "var(--ink)";
    this.mark = getComputedStyle(probe).color;
    probe.remove();
    this.draw();
  }

  /** Shows {layers, width, visits}, or nothing. */
  update(data) {
    this.data = data;
    this.draw();
    this.#table();
    if (this.#cell) this.#say();
    else say(byId("heat-cell"), "t", "heatHint");
  }

  draw() {
    const { data, canvas } = this;
    const width = canvas.parentElement.clientWidth;
    if (!data || !width || !this.#shades.length) return canvas.getContext("2d").reset();
    const height = data.layers.length * ROW + BOTTOM;
    const scale = devicePixelRatio;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    canvas.style.height = `${height}px`;
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    context.font = "10px system-ui, sans-serif";
    this.column = (width - LEFT) / data.width;
    const most = Math.max(...data.layers.map((_, place) => this.#most(place)), Number.MIN_VALUE);
    data.layers.forEach((each, place) => this.#row(context, each, place, most));
    this.#columnNames(context, height);
    byId("heat-least").textContent = percent(0);
    byId("heat-most").textContent = percent(most > 1e-9 ? most : 0);
  }

  #row(context, { layer, experts }, place, most) {
    const total = this.#total(place);
    for (let expert = 0; expert < experts; expert++) {
      const share = total ? this.visits(place, expert) / total : 0;
      context.fillStyle = this.#shades[Math.round((share / most) * (SHADES - 1))];
      context.fillRect(LEFT + expert * this.column + 0.5, place * ROW + 0.5, this.column - 1, ROW - 1);
    }
    const chosen = place === lens.value.place;
    context.fillStyle = chosen ? this.mark : this.ink;
    context.textAlign = "right";
    // Every second name where there are many layers.
    if (chosen || this.data.layers.length <= 12 || place % 2 === 0) context.fillText(layer, LEFT - 5, place * ROW + 11);
    if (!chosen) return;
    context.strokeStyle = this.mark;
    context.strokeRect(LEFT, place * ROW, experts * this.column, ROW);
  }

  #columnNames(context, height) {
    context.fillStyle = this.ink;
    context.textAlign = "center";
    for (let expert = 0; expert < this.data.width; expert += this.column > 22 ? 1 : LABEL_EVERY) {
      context.fillText(expert, LEFT + (expert + 0.5) * this.column, height - 4);
    }
  }

  visits(place, expert) {
    return this.data.visits[place * this.data.width + expert];
  }

  #total(place) {
    let total = 0;
    for (let expert = 0; expert < this.data.width; expert++) total += this.visits(place, expert);
    return total;
  }

  /** The largest share of a layer's choices. */
  #most(place) {
    const total = this.#total(place);
    let most = 0;
    for (let expert = 0; expert < this.data.width; expert++) most = Math.max(most, this.visits(place, expert));
    return total ? most / total : 0;
  }

  #point({ offsetX, offsetY }) {
    const place = Math.floor(offsetY / ROW);
    const expert = Math.floor((offsetX - LEFT) / this.column);
    if (!this.data?.layers[place] || expert < 0 || expert >= this.data.layers[place].experts) return false;
    this.#cell = { place, expert };
    this.#say();
    return true;
  }

  #key(event) {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (!this.data) return;
    if (event.key === "Enter" && this.#cell) this.#choose();
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    const { place, expert } = this.#cell ?? { place: lens.value.place, expert: 0 };
    const row = clamp(place + step[0], this.data.layers.length);
    this.#cell = { place: row, expert: clamp(expert + step[1], this.data.layers[row].experts) };
    this.#say();
  }

  /** The cell's layer colours the tokens, its expert stands in the light. */
  #choose() {
    look({ place: this.#cell.place, spotlight: this.#cell.expert }, true);
  }

  #say() {
    const { place, expert } = this.#cell;
    const layer = this.data?.layers[place]?.layer;
    if (layer === undefined) return;
    const total = this.#total(place);
    const share = percent(total ? this.visits(place, expert) / total : 0);
    delete byId("heat-cell").dataset.t;
    byId("heat-cell").textContent = t("heatCell", { layer, expert, visits: number(this.visits(place, expert)), share });
  }

  /** The numbers, where they are asked for. */
  #table() {
    const details = byId("heat-values");
    if (!details.open || !this.data) return;
    const { layers, width } = this.data;
    const names = Array.from({ length: width }, (_, expert) => el("th", {}, String(expert)));
    const head = el("tr", {}, el("th", { t: "layer" }), ...names);
    const rows = layers.map(({ layer, experts }, place) => {
      const cells = Array.from({ length: experts }, (_, expert) => el("td", {}, number(this.visits(place, expert))));
      return el("tr", {}, el("th", {}, String(layer)), ...cells);
    });
    details.querySelector(".scroll").replaceChildren(el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows)));
  }
}

const clamp = (value, count) => Math.max(0, Math.min(count - 1, value));

/** The colour of a share of the largest, in two stretches so that small differences show. */
function shade(share) {
  const [from, to, at] = share < 0.5 ? ["low", "middle", share * 2] : ["middle", "high", share * 2 - 1];
  return `color-mix(in oklab, var(--heat-${to}) ${(at * 100).toFixed(1)}%, var(--heat-${from}))`;
}
