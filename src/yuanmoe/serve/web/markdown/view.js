// A text that grows, shown as Markdown: only what may still change is rendered again.
//
// A block depends on nothing before it, so what lies above the last blocks is final. A paragraph may still swallow the
// line after it while that line is incomplete (`-` may become `-5 degrees`), and a table shows in its second line: a
// block is final when the next one began two whole lines ago.

import { el } from "../core/dom.js";
import { parseBlocks } from "./blocks.js";
import { renderBlock } from "./render.js";

const LINES_AFTER = 2;
const TAB = /^[ \t]*\t[ \t]*/;

const withoutTabs = (line) => line.replace(TAB, (lead) => lead.replaceAll("\t", "    "));

export class MarkdownView {
  #final = 0;
  #tail = [];
  #text = "";

  constructor() {
    this.node = el("div", { className: "prose" });
  }

  /** Shows `text`, which begins with what was shown before. */
  update(text) {
    if (text === this.#text) return;
    this.#text = text;
    const raw = text.replace(/\r\n?/g, "\n").slice(this.#final).split("\n");
    const blocks = parseBlocks(raw.map(withoutTabs));
    for (const node of this.#tail) node.remove();
    const nodes = blocks.map(renderBlock);
    this.node.append(...nodes);
    const kept = blocks.findIndex((_, index) => !isFinal(blocks, index, raw.length));
    if (kept > 0) this.#final += raw.slice(0, blocks[kept].start).reduce((sum, line) => sum + line.length + 1, 0);
    this.#tail = nodes.slice(Math.max(kept, 0));
  }
}

/** Whether more text leaves a block as it is; `lines` counts the last, incomplete one. */
function isFinal(blocks, index, lines) {
  return index + 1 < blocks.length && blocks[index + 1].start + LINES_AFTER < lines;
}
