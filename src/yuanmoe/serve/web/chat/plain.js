// A text that grows, shown as it is: code keeps its indentation, and no mark in it means anything.

import { el } from "../core/dom.js";

export class PlainView {
  #shown = 0;

  constructor() {
    this.node = el("pre", { className: "plain", tabIndex: 0, label: "asText" });
  }

  /** Shows `text`, which begins with what was shown before. */
  update(text) {
    if (text.length === this.#shown) return;
    this.node.append(text.slice(this.#shown));
    this.#shown = text.length;
  }
}
