// What the keyboard does from everywhere on the page; `?` lists it.

import { byId, el } from "../core/dom.js";

const COMMAND = navigator.platform.startsWith("Mac") ? "\u2318" : "Ctrl";

/** Keys and what they do, for the list: strings are `keys.<name>`. */
const LIST = [
  ["search", [COMMAND, "K"]],
  ["create", [COMMAND, "Shift", "O"]],
  ["list", [COMMAND, "B"]],
  ["question", ["/"]],
  ["send", ["Enter"]],
  ["break", ["Shift", "Enter"]],
  ["stop", ["Esc"]],
  ["help", ["?"]],
];

/** `actions` = {search, create, list, question}. */
export function startShortcuts(actions) {
  const dialog = byId("shortcuts");
  const help = () => dialog.showModal();
  byId("open-shortcuts").addEventListener("click", help);
  byId("close-shortcuts").addEventListener("click", () => dialog.close());
  byId("shortcut-list").replaceChildren(...LIST.map(row));
  const plain = { "/": actions.question, "?": help };
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.altKey || document.querySelector("dialog[open]")) return;
    const run = event.ctrlKey || event.metaKey ? commanded(event, actions) : typing(event.target) ? null : plain[event.key];
    if (!run) return;
    event.preventDefault();
    run();
  });
}

function commanded({ key, shiftKey }, { search, create, list }) {
  // Ctrl+Shift+N opens a private window, and no page may change that.
  return shiftKey ? { o: create }[key.toLowerCase()] : { k: search, b: list }[key.toLowerCase()];
}

const typing = (node) => node.matches("textarea, select, input:not([type=radio], [type=checkbox], [type=range])");

function row([name, keys]) {
  const spelled = keys.map((key) => el("kbd", {}, key));
  return el("div", {}, el("dt", { t: `keys.${name}` }), el("dd", {}, ...spelled));
}
