// Where questions are written: grows with the text, Enter sends, Shift+Enter breaks the line, Escape stops the answer.

import { byId } from "../core/dom.js";
import { submits } from "./message.js";

/**
 * `connect` asks again what the server is, where that is not known yet. Returns {propose, insert}: what puts a text
 * there for the reader to send, and what adds one.
 */
export function startComposer(session, connect) {
  const form = byId("composer");
  const area = byId("question");
  const send = byId("send");
  const stop = byId("stop");

  const ready = () => area.value.trim() !== "" && !session.writing;
  const refresh = () => {
    send.disabled = !ready();
    send.hidden = session.writing;
    // A button that goes away must not take the focus with it.
    const held = document.activeElement === stop && !session.writing;
    stop.hidden = !session.writing;
    if (held) area.focus();
  };
  const submit = async () => {
    if (ready() && !session.info.value) await connect();
    // A question that cannot be asked yet stays where it is.
    if (!ready() || !session.info.value) return;
    // A text that the model continues keeps its indentation and its last line break.
    const text = session.kind === "completion" ? area.value : area.value.trim();
    area.value = "";
    session.ask(text);
    refresh();
  };

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  area.addEventListener("input", refresh);
  area.addEventListener("keydown", (event) => {
    if (!submits(event)) return;
    event.preventDefault();
    submit();
  });
  stop.addEventListener("click", () => session.stop());
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !event.defaultPrevented && session.writing && !document.querySelector("dialog[open]")) session.stop();
  });
  session.current.watch(refresh);

  const put = (text) => {
    area.value = text;
    refresh();
    area.focus();
  };
  const insert = (text) => put(area.value && !area.value.endsWith("\n") ? `${area.value}\n${text}` : area.value + text);
  return { propose: put, insert };
}
