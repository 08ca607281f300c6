// A conversation is a tree of messages, so that editing a question or asking again keeps what was there before.
//
// A message is {id, conversation, parent, role, content, created}; an answer also has `status` (writing, done, stopped,
// dropped, failed), `finish`, `error`, `usage`, `timing`, of every token `surfaces` (its text) and `logprobs`, `routing`,
// `prompt` (tokens of what the model read before it) and `from` (the first message of that).

export const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(12)), hex).join("");
const hex = (byte) => byte.toString(16).padStart(2, "0");

const TITLE_LENGTH = 60;

export class Conversation {
  constructor(head, messages = []) {
    /**
     * {id, title, created, updated, leaf, settings}: what the list of conversations needs; `from` is the first message
     * that the model is sent, `fromTokens` the tokens from there on.
     */
    this.head = head;
    this.messages = new Map(messages.map((message) => [message.id, message]));
  }

  static start(settings) {
    const now = Date.now();
    return new Conversation({ id: newId(), title: "", created: now, updated: now, leaf: null, settings });
  }

  /** The messages that are shown, from the first question to the leaf. */
  path() {
    return this.above(this.head.leaf);
  }

  /** The messages from the first question to that one. */
  above(id) {
    const path = [];
    for (let at = this.messages.get(id); at; at = this.messages.get(at.parent)) path.push(at);
    return path.reverse();
  }

  /** The messages above that one, and itself, that the model is sent: those before `from` are left out. */
  sent(id) {
    const path = this.above(id);
    const first = path.findIndex((message) => message.id === this.head.from);
    return path.slice(Math.max(first, 0));
  }

  /** A new last message; the tree branches where `parent` had one already. */
  add(parent, role, content, more = {}) {
    const message = { id: newId(), conversation: this.head.id, parent, role, content, created: Date.now(), ...more };
    this.messages.set(message.id, message);
    this.head.leaf = message.id;
    this.head.updated = message.created;
    if (!this.head.title && role === "user") this.head.title = titleOf(content);
    return message;
  }

  /** The message with those that could stand in its place, oldest first. */
  siblings(message) {
    return this.children(message.parent);
  }

  children(parent) {
    return [...this.messages.values()].filter((each) => each.parent === parent).sort(byAge);
  }

  /** Shows the branch of that message, down to where it was last continued. */
  show(message) {
    let leaf = message;
    for (let below; (below = this.children(leaf.id)).length; ) leaf = below.at(-1);
    this.head.leaf = leaf.id;
  }

  /** Every answer, those of other branches too. */
  answers() {
    return [...this.messages.values()].filter((message) => message.role === "assistant");
  }
}

const byAge = (one, other) => one.created - other.created || (one.id < other.id ? -1 : 1);

export function titleOf(question) {
  const line = question.trim().split("\n", 1)[0];
  const characters = [...line];
  return characters.length > TITLE_LENGTH ? `${characters.slice(0, TITLE_LENGTH).join("")}\u2026` : line;
}
