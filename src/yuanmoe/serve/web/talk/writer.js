// One answer on its way: asks the server, fills a message as chunks come, and says how it ended.
//
// `message.status` becomes `done`, `stopped` (by the reader), `dropped` (the connection broke; what came is kept) or
// `failed` (refused, or broken on the server; `message.error` says why).

import { Routing } from "../experts/routing.js";
import { requestFields } from "../keep/settings.js";
import { post, ServerError, stream } from "./api.js";
import { readChunk } from "./chunk.js";

export class Writer {
  #abort = new AbortController();
  #decoder = new TextDecoder();

  /** `changed` is called after every chunk and at the end. */
  constructor({ info, conversation, message, changed }) {
    Object.assign(this, { info, conversation, message, changed });
  }

  stop() {
    this.#abort.abort();
  }

  /** Writes the answer from its first word, or on from its last. */
  async run() {
    const { message } = this;
    Object.assign(message, { status: "writing", finish: null, error: null });
    message.routing?.resumeAt(message.surfaces.length);
    try {
      const [path, body] = message.content ? await this.#continuation() : this.#question();
      const chunks = stream(path, { ...body, ...this.#common() }, this.#abort.signal);
      for await (const chunk of chunks) this.#take(readChunk(chunk));
      message.status = "done";
    } catch (error) {
      this.#ended(error);
    }
    this.changed();
    if (message.status !== "done" && message.content) await this.#countPrompt();
  }

  #messages() {
    const { system } = this.conversation.head.settings;
    const turns = this.conversation.above(this.message.parent).filter(({ content }) => content);
    const said = turns.map(({ role, content }) => ({ role, content }));
    return system.trim() ? [{ role: "system", content: system }, ...said] : said;
  }

  #question() {
    return ["v1/chat/completions", { messages: this.#messages(), logprobs: true }];
  }

  /** The conversation and what was said so far, as the tokens that a plain completion goes on from. */
  async #continuation() {
    const asked = await post("tokenize", { messages: this.#messages() });
    const said = await post("tokenize", { prompt: this.message.content });
    return ["v1/completions", { prompt: [...asked.tokens, ...said.tokens], max_tokens: null, logprobs: 0 }];
  }

  #common() {
    const { model, layers } = this.info;
    const { settings } = this.conversation.head;
    return { model: settings.model ?? model, routing: layers.length > 0, ...requestFields(settings) };
  }

  #take({ text, tokens, routing, finish, usage }) {
    const { message } = this;
    message.content += text;
    for (const { bytes, logprob } of tokens) {
      message.surfaces.push(this.#decoder.decode(bytes, { stream: true }));
      message.logprobs.push(logprob);
    }
    if (routing) message.routing.append(routing);
    message.finish ??= finish;
    if (usage) addUsage(message.usage, usage);
    this.changed();
  }

  #ended(error) {
    const { message } = this;
    if (this.#abort.signal.aborted) message.status = "stopped";
    else if (error instanceof ServerError) {
      // A server that goes away in the middle of a sentence can be asked to go on.
      message.status = error.kind === "dropped" ? "dropped" : "failed";
      message.error = error.toJSON();
    } else throw error;
  }

  /** An answer that did not end has no usage: its prompt is counted, and its tokens were. */
  async #countPrompt() {
    const { usage, surfaces } = this.message;
    usage.written = surfaces.length;
    try {
      usage.read ||= (await post("tokenize", { messages: this.#messages() })).tokens.length;
    } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      // The meter goes without this prompt.
    }
    this.changed();
  }
}

/** `usage` counts tokens that the server computed: read of prompts (not those found computed), and written. */
function addUsage(total, usage) {
  total.read += usage.prompt_tokens - (usage.prompt_tokens_details?.cached_tokens ?? 0);
  total.written += usage.completion_tokens;
}

/** The fields of an answer of which nothing is written yet. */
export function emptyAnswer(info) {
  const routing = info.layers.length ? new Routing(info) : null;
  const usage = { read: 0, written: 0 };
  return { status: "writing", finish: null, error: null, usage, surfaces: [], logprobs: [], routing };
}
