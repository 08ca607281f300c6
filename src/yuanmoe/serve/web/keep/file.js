// Conversations as a file of JSON: written for other programs to read, read with the suspicion that a stranger's needs.

import { Routing } from "../experts/routing.js";
import { Conversation, newId } from "./conversation.js";
import { sound } from "./settings.js";

const FORMAT = "yuanmoe-conversations";
const VERSION = 1;
const STATUS = ["done", "stopped", "dropped", "failed"];

export function toFile(conversations) {
  const written = conversations.map(({ head, messages }) => ({ ...head, messages: [...messages.values()] }));
  return JSON.stringify({ format: FORMAT, version: VERSION, conversations: written }, null, 1);
}

/** A file that holds no conversations; `code` names the reason, a string of `file.<code>`. */
export class FileError extends Error {
  constructor(code) {
    super(code);
    this.code = code;
  }
}

/** The conversations of a file, with ids of their own. Raises an Error when it holds none, a FileError if it is JSON. */
export function fromFile(text) {
  const file = JSON.parse(text);
  if (file?.format !== FORMAT || file.version !== VERSION || !Array.isArray(file.conversations)) {
    throw new FileError("format");
  }
  return file.conversations.map(readConversation);
}

function readConversation({ title, created, updated, leaf, settings, from, fromTokens, messages }) {
  if (!Array.isArray(messages)) throw new FileError("messages");
  // New ids: what is here already stays, also when the file was exported here.
  const ids = new Map(messages.map(({ id }) => [id, newId()]));
  const head = {
    id: newId(),
    title: String(title ?? ""),
    created: time(created),
    updated: time(updated),
    leaf: ids.get(leaf) ?? null,
    settings: sound(settings),
    from: ids.get(from) ?? null,
    fromTokens: count(fromTokens),
  };
  const read = messages.map((message) => readMessage(message, head.id, ids));
  const conversation = new Conversation(head, read);
  checkTree(conversation);
  return conversation;
}

function readMessage(message, conversation, ids) {
  const { role, content } = message;
  if (!["user", "assistant"].includes(role) || typeof content !== "string") throw new FileError("message");
  const [id, parent] = [ids.get(message.id), ids.get(message.parent) ?? null];
  const plain = { id, conversation, parent, role, content, created: time(message.created) };
  return role === "user" ? plain : { ...plain, ...readAnswer(message), from: ids.get(message.from) ?? null };
}

function readAnswer({ status, finish, usage, timing, prompt, surfaces, logprobs, routing }) {
  const texts = Array.isArray(surfaces) ? surfaces.map(String) : [];
  return {
    status: STATUS.includes(status) ? status : "stopped",
    finish: finish === "length" ? "length" : "stop",
    error: null,
    usage: { read: count(usage?.read), written: count(usage?.written) },
    timing: { firstS: seconds(timing?.firstS), writeS: seconds(timing?.writeS) ?? 0, tokens: count(timing?.tokens) },
    prompt: count(prompt),
    surfaces: texts,
    logprobs: texts.map((_, at) => (Number.isFinite(logprobs?.[at]) ? logprobs[at] : null)),
    routing: routing ? Routing.from(routing) : null,
  };
}

/** A message above itself would never end. */
function checkTree({ messages }) {
  for (let { parent } of messages.values()) {
    for (let steps = 0; parent; parent = messages.get(parent)?.parent) {
      if (++steps > messages.size) throw new FileError("circle");
    }
  }
}

const count = (value) => (Number.isInteger(value) && value > 0 ? value : 0);
const seconds = (value) => (Number.isFinite(value) && value > 0 ? value : null);
const time = (value) => (Number.isFinite(value) ? value : Date.now());
