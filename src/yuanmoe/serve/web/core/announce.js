// Short messages: said to screen readers, or shown for some seconds with something to do.

import { byId, el } from "./dom.js";

export function announce(text) {
  byId("announcer").textContent = text;
}

const SHOWN_MS = 8000;

/** A message at the foot of the page; `action` = {label, run} adds a button to it. */
export function toast(text, action) {
  const node = el("div", { className: "toast" }, el("span", {}, text));
  const timer = setTimeout(() => node.remove(), SHOWN_MS);
  if (action) {
    const click = () => {
      clearTimeout(timer);
      node.remove();
      action.run();
    };
    node.append(el("button", { type: "button", className: "quiet", on: { click } }, action.label));
  }
  byId("toasts").append(node);
}
