// From the turns of a conversation to what the model reads: messages for a chat, one text for a model that continues.

import { post } from "./api.js";

/** `chat` or `completion`: what the reader chose, or what the checkpoint's card says. */
export const kindOf = (info, settings) => settings.kind ?? info?.kind ?? "chat";

export function chatMessages({ system }, turns) {
  const said = turns.filter(({ content }) => content).map(({ role, content }) => ({ role, content }));
  return system.trim() ? [{ role: "system", content: system }, ...said] : said;
}

/** The turns as one text; what the reader adds begins on a line of its own. */
export function joinedText(turns) {
  let text = "";
  for (const { role, content } of turns) {
    if (role === "user" && text && !text.endsWith("\n")) text += "\n";
    text += content;
  }
  return text;
}

/** Token ids of what the model would read. */
export async function promptIds(info, settings, turns) {
  const text = kindOf(info, settings) === "completion";
  const body = text ? { prompt: joinedText(turns) } : { messages: chatMessages(settings, turns) };
  return (await post("tokenize", body)).tokens;
}
