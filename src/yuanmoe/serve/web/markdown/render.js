// Markdown as elements. Built node by node, so that text stays text; the only attribute that a text decides is the
// address of a link, which `safeAddress` let pass.

import { copyButton } from "../core/clipboard.js";
import { el } from "../core/dom.js";
import { parseInline } from "./inline.js";

/** The element of a block of `parseBlocks`. */
export const renderBlock = (block) => BLOCKS[block.type](block);

const BLOCKS = {
  paragraph: ({ text }) => el("p", {}, ...inline(text)),
  // The page's own headings are h1 and h2.
  heading: ({ level, text }) => el(`h${Math.min(6, level + 2)}`, {}, ...inline(text)),
  rule: () => el("hr"),
  quote: ({ blocks }) => el("blockquote", {}, ...blocks.map(renderBlock)),
  code: codeBlock,
  list,
  table,
};

function codeBlock({ language, text }) {
  const head = el("div", { className: "code-head" }, el("span", {}, language), copyButton(() => text, "copyCode"));
  // Wide code scrolls, also by keyboard.
  const code = el("pre", { tabIndex: 0 }, el("code", {}, text));
  return el("div", { className: "code" }, head, code);
}

function list({ ordered, first, loose, items }) {
  const rows = items.map((blocks) => el("li", {}, ...blocks.flatMap((block) => listed(block, loose))));
  return ordered ? el("ol", { start: first }, ...rows) : el("ul", {}, ...rows);
}

/** In a tight list a paragraph is only its text. */
function listed(block, loose) {
  if (block.type !== "paragraph") return [renderBlock(block)];
  const text = block.text.replace(/^\[([ xX])\] /, (_, mark) => (mark === " " ? "\u2610 " : "\u2611 "));
  return loose ? [el("p", {}, ...inline(text))] : [el("span", { className: "item" }, ...inline(text))];
}

function table({ align, head, rows }) {
  const row = (tag, cells) =>
    el("tr", {}, ...cells.map((cell, column) => el(tag, { className: `align-${align[column]}` }, ...inline(cell))));
  const body = el("tbody", {}, ...rows.map((cells) => row("td", cells)));
  return el("div", { className: "scroll", tabIndex: 0 }, el("table", {}, el("thead", {}, row("th", head)), body));
}

const inline = (text) => parseInline(text).map(renderInline);

function renderInline(node) {
  if (typeof node === "string") return node;
  if (node.type === "code") return el("code", {}, node.text);
  const children = node.children.map(renderInline);
  if (node.type !== "link") return el(node.type, {}, ...children);
  // The real address is shown to those who point at the link, whatever its text claims.
  const { href } = node;
  return el("a", { href, title: href, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);
}
