// Copies text, also where the page came over plain HTTP and browsers offer no clipboard.

import { iconButton, icon } from "./dom.js";
import { announce } from "./announce.js";
import { say, t } from "./language.js";

async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea");
  area.value = text;
  area.className = "unseen";
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  if (!done) throw new Error("the browser refused to copy");
}

const SHOWN_MS = 1600;

/** A button that copies what `text()` returns and says so. */
export function copyButton(text, label = "copy") {
  const button = iconButton("copy", label, async () => {
    let said = "copied";
    try {
      await copy(text());
    } catch {
      said = "copyFailed";
    }
    announce(t(said));
    button.replaceChildren(icon(said === "copied" ? "check" : "alert"));
    say(button, "tLabel", said);
    setTimeout(() => {
      button.replaceChildren(icon("copy"));
      say(button, "tLabel", label);
    }, SHOWN_MS);
  });
  button.classList.add("copy");
  return button;
}
