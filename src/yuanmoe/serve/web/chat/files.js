// Text files that are dropped on the page, or chosen, go into the question; they are read here and sent nowhere else.

import { toast } from "../core/announce.js";
import { byId } from "../core/dom.js";
import { number, t } from "../core/language.js";

/** More would not fit any model's context, and be slow to edit. */
const MOST_BYTES = 1024 * 1024;

/** `insert` puts a text into the question. */
export function startFiles(session, insert) {
  const take = async (files) => {
    for (const file of files) {
      const text = await read(file);
      if (text !== null) insert(session.kind === "completion" ? text : fenced(file.name, text));
    }
  };
  const input = byId("attach-file");
  byId("attach").addEventListener("click", () => input.click());
  input.addEventListener("change", async () => {
    await take([...input.files]);
    input.value = "";
  });
  startDropping(take);
}

function startDropping(take) {
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    // Without this the browser would leave the page and open the file.
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  document.addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) document.body.classList.remove("dropping");
  });
  document.addEventListener("drop", (event) => {
    document.body.classList.remove("dropping");
    if (!hasFiles(event)) return;
    event.preventDefault();
    take([...event.dataTransfer.files]);
  });
}

/** The text of a file; null, with a word to the reader, for one that is none. */
async function read(file) {
  if (file.size > MOST_BYTES) {
    const values = { name: file.name, size: number(file.size / 1024), most: number(MOST_BYTES / 1024) };
    toast(t("attach.tooLarge", values));
    return null;
  }
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    if (!text.includes("\0")) return text.replace(/\r\n?/g, "\n");
  } catch {
    // Bytes that are no text, or a folder, which cannot be read.
  }
  toast(t("attach.notText", { name: file.name }));
  return null;
}

/** A file as a block of code under its name; the fence is longer than any inside. */
function fenced(name, text) {
  const longest = Math.max(2, ...[...text.matchAll(/`{3,}/g)].map(([run]) => run.length));
  const fence = "`".repeat(longest + 1);
  return `${name}:\n${fence}\n${text.replace(/\n$/, "")}\n${fence}\n`;
}
