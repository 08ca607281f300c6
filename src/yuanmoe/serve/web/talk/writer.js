// One answer on its way: asks the server, fills a message as chunks come, and says how it ended.
//
// `message.status` becomes `done`, `stopped` (by the reader), `dropped` (the connection broke; what came is kept) or
// `failed` (refused, or broken on the server; `message.error` says why).

import { Routing } from "../experts/routing.js";
import { requestFields } from "../keep/settings.js";
import { post, ServerError, stream } from "./api.js";
import { readChunk } from "./chunk.js";
import { chatMessages, kindOf, promptIds } from "./prompt.js";
import { answerLimit, LEAST_ROOM, roomAfter } from "./room.js";

export class Writer {
  #abort = new AbortController();
  #decoder = new TextDecoder();
  #began = 0;
  #first = null;

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
      const [path, body] = await this.#request();
      this.#began = performance.now();
      for await (const chunk of stream(path, body, this.#abort.signal)) this.#take(readChunk(chunk));
      message.status = "done";
    } catch (error) {
      this.#ended(error);
    }
    this.#countWhatEnded();
    this.changed();
  }

  /** Path and body of the request: its tokens are counted first, so that the answer asked for fits the context. */
  async #request() {
    const { info, message, conversation } = this;
    const { settings, from } = conversation.head;
    const turns = conversation.sent(message.parent);
    const asked = await promptIds(info, settings, turns);
    const said = message.content ? (await post("tokenize", { prompt: message.content })).tokens : [];
    Object.assign(message, { prompt: asked.length, from: from ?? null });
    const tokens = asked.length + said.length;
    const room = roomAfter(info, tokens);
    if (room < LEAST_ROOM) throw new ServerError("context", "", { values: { tokens, limit: info.context } });
    const common = {
      model: info.adapters.includes(settings.model) ? settings.model : info.model,
      routing: info.layers.length > 0,
      ...requestFields(settings, info),
      max_tokens: Math.min(settings.max_tokens ?? answerLimit(info), room),
    };
    if (kindOf(info, settings) === "completion" || message.content) {
      return ["v1/completions", { ...common, prompt: [...asked, ...said], logprobs: 0 }];
    }
    return ["v1/chat/completions", { ...common, messages: chatMessages(settings, turns), logprobs: true }];
  }

  #take({ text, tokens, routing, finish, usage }) {
    const { message } = this;
    message.content += text;
    for (const { bytes, logprob } of tokens) {
      message.surfaces.push(this.#decoder.decode(bytes, { stream: true }));
      message.logprobs.push(logprob);
    }
    if (tokens.length) this.#time(tokens.length);
    if (routing) message.routing.append(routing);
    message.finish ??= finish;
    if (usage) addUsage(message.usage, usage);
    this.changed();
  }

  /** Seconds to the first token, and of the tokens after it; a continued answer adds to what it had. */
  #time(tokens) {
    const { timing } = this.message;
    const now = performance.now();
    if (this.#first === null) timing.firstS ??= (now - this.#began) / 1000;
    else {
      timing.tokens += tokens;
      timing.writeS += (now - this.#first) / 1000;
    }
    this.#first = now;
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

  /** An answer that was cut off has no usage: its prompt is known, and its tokens were counted. */
  #countWhatEnded() {
    const { status, content, usage, prompt, surfaces } = this.message;
    if (status === "done" || !content) return;
    usage.written = surfaces.length;
    usage.read ||= prompt;
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
  const timing = { firstS: null, writeS: 0, tokens: 0 };
  return { status: "writing", finish: null, error: null, usage, timing, surfaces: [], logprobs: [], routing };
}
