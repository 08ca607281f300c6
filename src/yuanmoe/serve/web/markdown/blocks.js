// Markdown's blocks: lines of text to a tree of plain objects. A subset of CommonMark (spec.commonmark.org) with GFM's
// tables, lenient where models are careless. Not understood, and so shown as they are: HTML, setext headings, indented
// code, link definitions. Linear in the text: no pattern here backtracks, and what nests is bounded by MAX_DEPTH.

const MAX_DEPTH = 8;
const FENCE = /^ {0,3}(`{3,}|~{3,})/;
const HEADING = /^ {0,3}(#{1,6})(?=[ \t]|$)/;
const QUOTE = /^ {0,3}> ?/;
const MARKER = /^( {0,3})([-*+]|\d{1,9}[.)])( +|$)/;
const RULE = /^(-{3,}|\*{3,}|_{3,})$/;
const blank = (line) => line.trim() === "";

/** Blocks of the lines, each with `start`, its first line's index. */
export function parseBlocks(lines, depth = 0) {
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    if (blank(lines[at])) {
      at++;
      continue;
    }
    const found = PARSERS[kind(lines, at, depth)](lines, at, depth);
    blocks.push({ ...found.block, start: at });
    at = found.end;
  }
  return blocks;
}

const PARSERS = { code, heading, rule, quote, list, table, paragraph };

/** What starts at that line. */
function kind(lines, at, depth) {
  const line = lines[at];
  if (opensFence(line)) return "code";
  if (HEADING.test(line)) return "heading";
  if (RULE.test(line.replace(/\s/g, ""))) return "rule";
  if (depth < MAX_DEPTH && QUOTE.test(line)) return "quote";
  if (depth < MAX_DEPTH && MARKER.test(line)) return "list";
  return columns(lines, at) ? "table" : "paragraph";
}

/** Whether a paragraph ends before that line. Of numbers only 1 begins a list there: sentences wrap before years. */
function interrupts(lines, at, depth) {
  const found = kind(lines, at, depth);
  if (found !== "list") return found !== "paragraph";
  const [marker, , name] = MARKER.exec(lines[at]);
  return marker !== lines[at] && (name.length === 1 || parseInt(name, 10) === 1);
}

function opensFence(line) {
  const fence = FENCE.exec(line)?.[1];
  return fence !== undefined && !(fence[0] === "`" && line.trim().slice(fence.length).includes("`"));
}

function code(lines, at) {
  const [opening, fence] = FENCE.exec(lines[at]);
  const indent = opening.length - fence.length;
  const language = lines[at].slice(opening.length).trim().split(/\s/, 1)[0];
  let end = at + 1;
  while (end < lines.length && !closesFence(lines[end], fence)) end++;
  const text = lines.slice(at + 1, end).map((line) => unindent(line, indent)).join("\n");
  return { block: { type: "code", language, text }, end: end + 1 };
}

function closesFence(line, fence) {
  const found = FENCE.exec(line)?.[1];
  return found?.[0] === fence[0] && found.length >= fence.length && line.trim() === found;
}

function heading(lines, at) {
  const [opening, marks] = HEADING.exec(lines[at]);
  const text = lines[at].slice(opening.length).trim();
  let end = text.length;
  while (text[end - 1] === "#") end--;
  const closed = end === 0 || /\s/.test(text[end - 1]);
  const block = { type: "heading", level: marks.length, text: closed ? text.slice(0, end).trim() : text };
  return { block, end: at + 1 };
}

function rule(lines, at) {
  return { block: { type: "rule" }, end: at + 1 };
}

function quote(lines, at, depth) {
  const inside = [];
  let end = at;
  for (; end < lines.length && !blank(lines[end]); end++) {
    const mark = QUOTE.exec(lines[end]);
    // A line without the mark goes on with the paragraph above it.
    if (!mark && interrupts(lines, end, depth)) break;
    inside.push(lines[end].slice(mark?.[0].length ?? 0));
  }
  return { block: { type: "quote", blocks: parseBlocks(inside, depth + 1) }, end };
}

function list(lines, at, depth) {
  const name = MARKER.exec(lines[at])[2];
  const items = [];
  let end = at;
  let loose = false;
  while (end < lines.length && sameList(lines[end], name)) {
    const item = listItem(lines, end, depth);
    items.push(parseBlocks(item.lines, depth + 1));
    end = item.end;
    let next = end;
    while (next < lines.length && blank(lines[next])) next++;
    const more = next < lines.length && sameList(lines[next], name);
    loose ||= item.loose || (more && next > end);
    if (more) end = next;
  }
  const ordered = name.length > 1;
  return { block: { type: "list", ordered, first: ordered ? parseInt(name, 10) : 1, loose, items }, end };
}

/** Whether a line is an item of the list with that marker; a rule of stars is none. */
function sameList(line, name) {
  const found = MARKER.exec(line)?.[2];
  return found?.at(-1) === name.at(-1) && !RULE.test(line.replace(/\s/g, ""));
}

function listItem(lines, at, depth) {
  const [marker, indent, name, gap] = MARKER.exec(lines[at]);
  const content = gap.length > 4 ? indent.length + name.length + 1 : marker.length;
  // Two columns make a line part of the item; by the book it is the width of the marker, which models miscount.
  const enough = indent.length + 2;
  const inside = [lines[at].slice(content)];
  let end = at + 1;
  let loose = false;
  for (; end < lines.length; end++) {
    if (blank(lines[end])) {
      let next = end;
      while (next < lines.length && blank(lines[next])) next++;
      if (next === lines.length || width(lines[next]) < enough) break;
      inside.push(...Array(next - end).fill(""));
      loose ||= !MARKER.test(lines[next].trim());
      end = next;
    } else if (width(lines[end]) < enough && !goesOn(lines, end, depth, inside.at(-1))) break;
    inside.push(unindent(lines[end], content));
  }
  return { lines: inside, end, loose };
}

/** Whether a line that is not indented still belongs to the paragraph of the item above it. */
function goesOn(lines, at, depth, above) {
  return !MARKER.test(lines[at]) && !interrupts(lines, at, depth) && !FENCE.test(above);
}

const width = (line) => line.length - line.trimStart().length;
const unindent = (line, columns) => line.slice(Math.min(columns, width(line)));

/** The alignments of a table whose head is that line; null where there is none. */
function columns(lines, at) {
  if (at + 1 >= lines.length || !lines[at].includes("|")) return null;
  const marks = cells(lines[at + 1]);
  if (!marks.every((mark) => /^:?-+:?$/.test(mark)) || cells(lines[at]).length !== marks.length) return null;
  return marks.map((mark) => (mark.endsWith(":") ? (mark.startsWith(":") ? "center" : "end") : "start"));
}

function table(lines, at, depth) {
  const align = columns(lines, at);
  let end = at + 2;
  const goesOn = (line) => !blank(line) && (line.includes("|") || !interrupts(lines, end, depth));
  while (end < lines.length && goesOn(lines[end])) end++;
  const fit = (row) => align.map((_, column) => row[column] ?? "");
  const rows = lines.slice(at + 2, end).map((line) => fit(cells(line)));
  return { block: { type: "table", align, head: cells(lines[at]), rows }, end };
}

/** A row's cells; a bar after a backslash is text. */
function cells(line) {
  const row = line.trim().replace(/^\|/, "").split("|");
  const parts = [];
  for (const piece of row) {
    if (parts.at(-1)?.endsWith("\\")) parts.push(`${parts.pop().slice(0, -1)}|${piece}`);
    else parts.push(piece);
  }
  if (parts.length > 1 && blank(parts.at(-1))) parts.pop();
  return parts.map((part) => part.trim());
}

function paragraph(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && !blank(lines[end]) && !interrupts(lines, end, depth)) end++;
  return { block: { type: "paragraph", text: lines.slice(at, end).map((line) => line.trim()).join("\n") }, end };
}
