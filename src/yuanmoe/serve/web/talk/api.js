// The server's endpoints, and its refusals as errors that know what to do about them.

import { apiKey } from "../keep/settings.js";
import { events } from "./sse.js";

/**
 * What went wrong. `kind` says what to do: `unreachable`, `key`, `busy`, `context`, `request`, `slow`, `server`;
 * `message` is the server's own words, `code` what they are about in one word, `param` the setting, `retryAfterS` when to
 * ask again, `values` numbers that belong to it.
 */
export class ServerError extends Error {
  constructor(kind, message, { code = null, param = null, retryAfterS = null, values = null } = {}) {
    super(message);
    Object.assign(this, { kind, code, param, retryAfterS, values });
  }

  /** What can be kept in a conversation. */
  toJSON() {
    const { kind, message, code, param, retryAfterS, values } = this;
    return { kind, message, code, param, retryAfterS, values };
  }
}

const KINDS = { 401: "key", 403: "key", 408: "slow", 429: "busy", 503: "busy" };

function kindOf(status, code, retryAfterS) {
  if (code === "context_length_exceeded") return "context";
  // One that is about to end, or whose engine died, does not say when to come back.
  if (status === 503 && retryAfterS === null) return "server";
  return KINDS[status] ?? (status >= 500 ? "server" : "request");
}

/** The error that a body of `{"error": ...}` describes. */
export function errorOf(body, status = 500, retryAfter = null) {
  const error = body?.error ?? {};
  const retryAfterS = retryAfter === null ? null : Number(retryAfter);
  const message = error.message ?? `HTTP ${status}`;
  const { code = null, param = null } = error;
  return new ServerError(kindOf(status, code, retryAfterS), message, { code, param, retryAfterS });
}

async function request(path, body, signal) {
  const headers = apiKey.get() ? { Authorization: `Bearer ${apiKey.get()}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: JSON.stringify(body), signal });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ServerError("unreachable", "");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  throw errorOf(said, response.status, response.headers.get("Retry-After"));
}

export const get = async (path) => (await request(path)).json();
export const post = async (path, body) => (await request(path, body)).json();

/** The chunks of a streamed answer. Raises ServerError when one of them is an error, or the stream breaks off. */
export async function* stream(path, body, signal) {
  const response = await request(path, { ...body, stream: true, stream_options: { include_usage: true } }, signal);
  let done = false;
  try {
    for await (const data of events(response.body)) {
      done = data === "[DONE]";
      // Read to its end, or the browser takes the response for one that was given up.
      if (done) continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw errorOf(chunk, statusOf(chunk.error));
      yield chunk;
    }
  } catch (error) {
    if (error instanceof ServerError || signal.aborted) throw error;
    throw new ServerError("dropped", "");
  }
  if (!done) throw new ServerError("dropped", "");
}

/** An error on the way has no status of its own; its type stands for one. */
const TYPES = { overloaded_error: 503, timeout_error: 408, rate_limit_error: 429, invalid_request_error: 400 };
const statusOf = (error) => TYPES[error.type] ?? 500;
