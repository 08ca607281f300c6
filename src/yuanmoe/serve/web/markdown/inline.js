// Markdown's inline marks: one text to a list of strings and {type, children} objects; types are code, strong, em, del
// and link. One pass, linear in the text: an opening mark that never closes costs its place on a stack, nothing more.
// Whether a star opens or closes depends on spaces alone, so that it works beside Chinese punctuation too.

const MAX_OPEN = 24;
const MAX_ADDRESS = 2000;
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const SPACE = /\s/;
const WORD = /[\p{L}\p{N}]/u;
const LATIN = /\w/;
// An address ends where Chinese punctuation begins; full stops and brackets at its end are the sentence's.
const BARE_ADDRESS = /https?:\/\/[^\s<>"'`\u3000-\u303f\uff00-\uff0f\uff1a-\uff20]{1,2000}/iy;
const TRAILING = ".,:;!?*_~";

/** The address if a link may lead there: http or https, absolute. */
export function safeAddress(text) {
  if (!/^https?:\/\//i.test(text) || text.length > MAX_ADDRESS) return null;
  try {
    return new URL(text).href;
  } catch {
    return null;
  }
}

export function parseInline(text) {
  return new Parser(text).run();
}

class Parser {
  constructor(text) {
    this.text = text;
    this.at = 0;
    /** Nodes so far; a mark that may open something is {mark, count} until it closes, and text if it never does. */
    this.nodes = [];
    /** Places in `nodes` of marks that may still close. */
    this.open = [];
    this.backticks = backtickRuns(text);
  }

  run() {
    while (this.at < this.text.length) this.step();
    return flatten(this.nodes);
  }

  step() {
    const character = this.text[this.at];
    if (character === "\\" && PUNCTUATION.test(this.text[this.at + 1] ?? "")) this.plain(this.text[this.at + 1], 2);
    else if (character === "`") this.code();
    else if (character === "*" || character === "_" || character === "~") this.emphasis(character);
    else if (character === "[" || (character === "!" && this.text[this.at + 1] === "[")) this.bracket(character);
    else if (character === "]") this.closeBracket();
    else if (character === "<") this.pointedAddress();
    else if (character === "h" || character === "H") this.bareAddress();
    else this.plain(character, 1);
  }

  plain(text, length) {
    const last = this.nodes.length - 1;
    if (typeof this.nodes[last] === "string") this.nodes[last] += text;
    else this.nodes.push(text);
    this.at += length;
  }

  code() {
    const length = runLength(this.text, this.at);
    const places = this.backticks.get(length);
    while (places.length && places.at(-1) <= this.at) places.pop();
    const end = places.at(-1);
    if (end === undefined) return this.plain("`".repeat(length), length);
    const inside = this.text.slice(this.at + length, end).replaceAll("\n", " ");
    const padded = inside.length > 2 && inside.startsWith(" ") && inside.endsWith(" ") && inside.trim();
    this.nodes.push({ type: "code", text: padded ? inside.slice(1, -1) : inside });
    this.at = end + length;
  }

  emphasis(mark) {
    const run = runLength(this.text, this.at);
    const before = this.text[this.at - 1] ?? " ";
    const after = this.text[this.at + run] ?? " ";
    const inWord = mark === "_" && WORD.test(before) && WORD.test(after);
    let left = run;
    if (!SPACE.test(before) && !inWord) left = this.close(mark, run);
    const opens = left > 0 && !SPACE.test(after) && !inWord && (mark !== "~" || left === 2);
    if (opens && this.open.length < MAX_OPEN) {
      this.open.push(this.nodes.length);
      this.nodes.push({ mark, count: left });
    } else if (left) this.plain(mark.repeat(left), 0);
    this.at += run;
  }

  /** Closes what such a run can close; how much of it is left. */
  close(mark, run) {
    for (;;) {
      const place = this.open.findLastIndex((index) => this.nodes[index].mark === mark);
      const opener = this.nodes[this.open[place]];
      const used = mark === "~" ? 2 : Math.min(2, run, opener?.count ?? 0);
      if (!opener || run < used || used === 0 || opener.count < used) return run;
      // Nothing between the marks is no emphasis.
      if (this.open[place] === this.nodes.length - 1) return run;
      const children = flatten(this.nodes.splice(this.open[place] + 1));
      opener.count -= used;
      run -= used;
      this.open.length = opener.count ? place + 1 : place;
      if (!opener.count) this.nodes.pop();
      this.nodes.push({ type: mark === "~" ? "del" : used === 2 ? "strong" : "em", children });
    }
  }

  bracket(character) {
    const length = character === "!" ? 2 : 1;
    if (this.open.length >= MAX_OPEN) return this.plain(this.text.slice(this.at, this.at + length), length);
    this.open.push(this.nodes.length);
    this.nodes.push({ mark: character === "!" ? "![" : "[", count: 1 });
    this.at += length;
  }

  /** `[name](address)`, and for an image the same: its name links to where it lies, and nothing is loaded. */
  closeBracket() {
    const place = this.open.findLastIndex((index) => this.nodes[index].mark.endsWith("["));
    const target = place < 0 ? null : this.address(this.at + 1);
    if (place >= 0 && !target) this.open.splice(place, 1);
    if (!target) return this.plain("]", 1);
    const children = flatten(this.nodes.splice(this.open[place]).slice(1));
    this.open.length = place;
    this.link(target.href, children.length ? children : [target.href]);
    this.at = target.end;
  }

  /** The address in the parentheses that begin there, and the place after them. */
  address(at) {
    const end = this.text[at] === "(" ? closingParenthesis(this.text, at) : -1;
    const written = end < 0 ? "" : this.text.slice(at + 1, end).trim().split(/\s/, 1)[0];
    const href = safeAddress(written.replace(/^<(.*)>$/, "$1"));
    return href && { href, end: end + 1 };
  }

  pointedAddress() {
    const end = this.text.indexOf(">", this.at);
    const inside = end < 0 || end - this.at > MAX_ADDRESS ? "" : this.text.slice(this.at + 1, end);
    const href = SPACE.test(inside) ? null : safeAddress(inside);
    if (!href) return this.plain("<", 1);
    this.link(href, [inside]);
    this.at = end + 1;
  }

  bareAddress() {
    BARE_ADDRESS.lastIndex = this.at;
    const found = LATIN.test(this.text[this.at - 1] ?? "") ? null : BARE_ADDRESS.exec(this.text)?.[0];
    const written = found && withoutTrailing(found);
    const href = written && safeAddress(written);
    if (!href) return this.plain(this.text[this.at], 1);
    this.link(href, [written]);
    this.at += written.length;
  }

  /** A link, unless one is open around it: a link in a link is text. */
  link(href, children) {
    this.nodes.push({ type: "link", href, children: children.flatMap(unlinked) });
  }
}

function unlinked(node) {
  if (node.type === "link") return node.children;
  return node.children ? [{ ...node, children: node.children.flatMap(unlinked) }] : [node];
}

/** Marks that did not close as text, and neighbouring texts as one. */
function flatten(nodes) {
  const flat = [];
  for (const node of nodes) {
    const part = node.mark ? node.mark.repeat(node.count) : node;
    if (typeof part === "string" && typeof flat.at(-1) === "string") flat.push(flat.pop() + part);
    else flat.push(part);
  }
  return flat;
}

/** The place of the parenthesis that closes the one at `at`, on the same line and not too far; -1 without one. */
function closingParenthesis(text, at) {
  const limit = Math.min(text.length, at + MAX_ADDRESS);
  let depth = 0;
  for (let end = at; end < limit && text[end] !== "\n"; end++) {
    if (text[end] === "(") depth++;
    else if (text[end] === ")" && --depth === 0) return end;
  }
  return -1;
}

function runLength(text, at) {
  let end = at;
  while (text[end] === text[at]) end++;
  return end - at;
}

/** Length of a run of backticks: where such runs begin, the last first. */
function backtickRuns(text) {
  const runs = new Map();
  for (const { 0: run, index } of text.matchAll(/`+/g)) {
    if (!runs.has(run.length)) runs.set(run.length, []);
    runs.get(run.length).push(index);
  }
  for (const places of runs.values()) places.reverse();
  return runs;
}

function withoutTrailing(address) {
  let end = address.length;
  let unmatched = 0;
  for (const character of address) unmatched += character === "(" ? 1 : character === ")" ? -1 : 0;
  for (; end > 0; end--) {
    const last = address[end - 1];
    if (last === ")" && unmatched < 0) unmatched++;
    else if (!TRAILING.includes(last)) break;
  }
  return address.slice(0, end);
}
