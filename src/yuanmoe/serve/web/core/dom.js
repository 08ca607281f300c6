// Elements without markup: text goes in as text, so nothing that a model said can become HTML.

import { say } from "./language.js";

/** An element. `props` are properties, except `data` (dataset), `aria`, `on` (listeners) and `t`, `label` (strings). */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) set(node, name, value);
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function set(node, name, value) {
  if (value === undefined || value === null) return;
  if (name === "data") Object.assign(node.dataset, value);
  else if (name === "on") for (const [event, run] of Object.entries(value)) node.addEventListener(event, run);
  else if (name === "aria") for (const [key, text] of Object.entries(value)) node.setAttribute(`aria-${key}`, text);
  else if (name === "t") say(node, "t", value);
  else if (name === "label") say(node, "tLabel", value);
  else if (name in node) node[name] = value;
  else node.setAttribute(name, value);
}

export const byId = (id) => document.getElementById(id);

/** Beside this module, whose path names the version of the page. */
const ICONS = new URL("../icons.svg", import.meta.url).pathname;
const SVG = "http://www.w3.org/2000/svg";

/** One of the drawings of icons.svg, for the eye only. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `${ICONS}#${name}`);
  svg.append(use);
  return svg;
}

/** A button with an icon that is named by a string of the table. */
export function iconButton(name, label, click, props = {}) {
  return el("button", { type: "button", className: "icon", label, on: { click }, ...props }, icon(name));
}

/** Calls `run` in the next frame after it was asked for, once however often that was, and so many ms apart at least. */
export function oncePerFrame(run, apartMs = 0) {
  let due = false;
  let last = -Infinity;
  const fire = (now) => {
    if (now - last < apartMs) return requestAnimationFrame(fire);
    due = false;
    last = now;
    return run();
  };
  return () => {
    if (!due) requestAnimationFrame(fire);
    due = true;
  };
}
