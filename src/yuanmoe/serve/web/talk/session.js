// What the page is about: the server, the conversations, the one that is shown, and the answers being written.
// Nothing here knows about elements; views watch the signals.

import { signal } from "../core/signal.js";
import { Conversation } from "../keep/conversation.js";
import { fromFile, toFile } from "../keep/file.js";
import { lastSettings, rememberSettings } from "../keep/settings.js";
import { Shelf } from "../keep/shelf.js";
import { Routing } from "../experts/routing.js";
import { kindOf, promptIds } from "./prompt.js";
import { answerLimit, firstThatFits, LEAST_ROOM, roomAfter, takenBy } from "./room.js";
import { emptyAnswer, Writer } from "./writer.js";

const SAVE_MS = 2000;

export class Session {
  /** {model, layers, chosen, ...}: see info.js; null until the server said it. */
  info = signal(null);
  /** Heads of all conversations, the latest first. */
  heads = signal([]);
  /** The conversation that is shown, from the start on; changes with its path. */
  current = signal(null);
  /** Whether what is said is saved; not where the browser has no room for it. */
  kept = signal(true);
  /** The message that grew or changed last. */
  touched = signal(null);
  #shelf = null;
  /** Conversations with an answer on its way, and the one that is shown, by id: they are alive in one copy only. */
  #alive = new Map();
  #writers = new Map();
  #due = new Map();

  async start() {
    this.#shelf = await Shelf.open();
    const heads = (await this.#shelf?.heads()) ?? [];
    this.heads.value = heads;
    if (heads.length) await this.open(heads[0].id);
    else this.create();
    this.kept.value = this.#shelf !== null;
  }

  /** A new conversation; it is kept from its first question on. */
  create() {
    this.#show(Conversation.start(lastSettings()));
  }

  async open(id) {
    const conversation = this.#alive.get(id) ?? (await this.#read(id));
    if (conversation) this.#show(conversation);
  }

  #show(conversation) {
    const before = this.current.value?.head.id;
    if (before && this.#shelf && !this.#writers.has(before)) this.#alive.delete(before);
    this.#alive.set(conversation.head.id, conversation);
    this.current.value = conversation;
  }

  async #read(id) {
    const conversation = await this.#shelf?.read(id);
    for (const message of conversation?.messages.values() ?? []) revive(message);
    return conversation;
  }

  /** Whether an answer of the conversation that is shown is on its way. */
  get writing() {
    return this.#writers.has(this.current.value.head.id);
  }

  stop() {
    this.#writers.get(this.current.value.head.id)?.stop();
  }

  ask(text) {
    const conversation = this.current.value;
    this.#answer(conversation, conversation.add(conversation.head.leaf, "user", text));
  }

  /** Asks something else in the place of a question; the old branch stays. */
  edit(question, text) {
    this.#answer(this.current.value, this.current.value.add(question.parent, "user", text));
  }

  /** `chat`, or `completion` where the model continues texts. */
  get kind() {
    return kindOf(this.info.value, this.current.value.head.settings);
  }

  /** {full, older}: whether nothing fits after that answer, and whether there are older turns to leave out. */
  room(answer) {
    const info = this.info.value;
    const older = this.current.value.sent(answer.parent).filter(({ role }) => role === "user").length > 1;
    return { full: info !== null && Boolean(answer.prompt) && roomAfter(info, takenBy(answer)) < LEAST_ROOM, older };
  }

  /** Leaves the oldest turns before a message out of what the model is sent, until half of the context is free. */
  async leaveOut(id) {
    const conversation = this.current.value;
    const { head } = conversation;
    const turns = conversation.sent(id);
    const starts = turns.flatMap(({ role }, at) => (role === "user" ? [at] : []));
    if (starts.length < 2) return;
    const count = async (at) => (await promptIds(this.info.value, head.settings, turns.slice(starts[at]))).length;
    const first = await firstThatFits(starts.length, answerLimit(this.info.value), count);
    Object.assign(head, { from: turns[starts[first]].id, fromTokens: await count(first) });
    this.#save(conversation);
    this.current.changed();
  }

  /** Sends the whole conversation again. */
  takeBack() {
    Object.assign(this.current.value.head, { from: null, fromTokens: null });
    this.#save(this.current.value);
    this.current.changed();
  }

  /** Asks again: in the place of an answer of which nothing came, beside one that began. */
  retry(answer) {
    if (answer.content) this.regenerate(answer);
    else this.write(answer);
  }

  /** The ids of conversations with a text in their title or their messages. */
  async find(text) {
    const wanted = text.toLocaleLowerCase();
    const named = this.heads.value.filter(({ title }) => title.toLocaleLowerCase().includes(wanted));
    const found = (await this.#shelf?.mentions(text)) ?? new Set();
    for (const { id } of named) found.add(id);
    return found;
  }

  /** Another answer to the same question. */
  regenerate(answer) {
    const conversation = this.current.value;
    this.#answer(conversation, conversation.messages.get(answer.parent));
  }

  #answer(conversation, question) {
    this.#save(conversation, question);
    this.write(conversation.add(question.id, "assistant", "", emptyAnswer(this.info.value)));
  }

  /** Writes an answer, or on from where it broke off. */
  async write(message) {
    const conversation = this.current.value;
    if (this.#writers.has(conversation.head.id)) return;
    const changed = () => {
      this.#saveSoon(conversation, message);
      this.touched.value = message;
      this.touched.changed();
    };
    const writer = new Writer({ info: this.info.value, conversation, message, changed });
    this.#writers.set(conversation.head.id, writer);
    this.current.changed();
    try {
      await writer.run();
    } finally {
      this.#writers.delete(conversation.head.id);
      this.#save(conversation, message);
      this.current.changed();
    }
  }

  /** Shows another branch. */
  choose(message) {
    this.current.value.show(message);
    this.#save(this.current.value);
    this.current.changed();
  }

  configure(settings) {
    const { head, messages } = this.current.value;
    head.settings = settings;
    rememberSettings(settings);
    if (messages.size) this.#save(this.current.value);
    this.current.changed();
  }

  async rename(id, title) {
    const head = this.heads.value.find((each) => each.id === id);
    // A conversation that is alive has the head that counts.
    for (const each of [head, this.#alive.get(id)?.head]) if (each) each.title = title;
    await this.#write(head, []);
    this.heads.changed();
    this.current.changed();
  }

  /** Removes a conversation; returns what puts it back. */
  async remove(id) {
    const conversation = this.#alive.get(id) ?? (await this.#read(id));
    this.#writers.get(id)?.stop();
    this.#alive.delete(id);
    await this.#shelf?.remove(id);
    this.heads.value = this.heads.value.filter((head) => head.id !== id);
    if (this.current.value.head.id === id) {
      if (this.heads.value.length) await this.open(this.heads.value[0].id);
      else this.create();
    }
    return () => this.#keep(conversation);
  }

  async export() {
    const read = this.heads.value.map(({ id }) => this.#alive.get(id) ?? this.#read(id));
    return toFile(await Promise.all(read));
  }

  /** Adds the conversations of a file; returns how many. Raises an Error for a file that holds none. */
  async import(text) {
    const conversations = fromFile(text);
    for (const conversation of conversations) await this.#keep(conversation);
    return conversations.length;
  }

  async #keep(conversation) {
    this.#show(conversation);
    await this.#save(conversation, ...conversation.messages.values());
  }

  #saveSoon(conversation, message) {
    if (this.#due.has(message.id)) return;
    this.#due.set(message.id, setTimeout(() => this.#save(conversation, message), SAVE_MS));
  }

  async #save(conversation, ...messages) {
    for (const { id } of messages) {
      clearTimeout(this.#due.get(id));
      this.#due.delete(id);
    }
    const { head } = conversation;
    // One that was removed while its answer was on its way stays removed.
    if (!this.#alive.has(head.id)) return;
    this.heads.value = [head, ...this.heads.value.filter(({ id }) => id !== head.id)].sort(byUpdate);
    await this.#write(head, messages);
  }

  async #write(head, messages) {
    try {
      await this.#shelf?.write(head, messages.map(plain));
    } catch {
      // A full disk, or a database that the browser took away; the conversation goes on.
      this.kept.value = false;
    }
  }
}

const byUpdate = (one, other) => other.updated - one.updated;

const plain = (message) => ({ ...message, routing: message.routing?.toJSON() ?? null });

/** A message from the database; an answer that was on its way when the page went away broke off there. */
function revive(message) {
  if (message.routing) message.routing = Routing.from(message.routing);
  if (message.status === "writing") message.status = "dropped";
  if (message.role === "assistant") message.timing ??= { firstS: null, writeS: 0, tokens: 0 };
}
