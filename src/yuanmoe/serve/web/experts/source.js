// Whose visits the panel shows: those of one answer, of the conversation as shown, or of everything the server did.

import { get, ServerError } from "../talk/api.js";
import { signal } from "../core/signal.js";

const EVERY_MS = 2000;

export class Source {
  /** `answer`, `conversation` or `server`. */
  kind = signal("answer");
  #server = signal(null);
  #timer = null;

  /** `view` is the signal of what the page shows; `changed` is called when `read` says something new. */
  constructor(session, view, changed) {
    Object.assign(this, { session, view });
    this.#server.watch(changed);
    for (const cause of [this.kind, view, session.info]) {
      cause.watch(() => {
        this.#ask();
        changed();
      });
    }
    document.addEventListener("visibilitychange", () => this.#ask());
  }

  /** {layers, width, visits [L, E], tokens}; null while there is nothing. */
  read() {
    return this.kind.value === "server" ? this.#server.value : this.#sum();
  }

  #sum() {
    const info = this.session.info.value;
    const answers = this.session.current.value.path().filter(({ routing }) => fits(routing, info));
    const counted = this.kind.value === "answer" ? answers.slice(-1) : answers;
    if (!counted.length) return null;
    const { layers, width } = counted[0].routing;
    const visits = new Float64Array(counted[0].routing.visits.length);
    for (const { routing } of counted) routing.visits.forEach((count, at) => (visits[at] += count));
    return { layers, width, visits, tokens: counted.reduce((sum, { routing }) => sum + routing.length, 0) };
  }

  /** Asks the server again and again, while someone looks. */
  async #ask() {
    clearTimeout(this.#timer);
    if (this.kind.value !== "server" || this.view.value !== "experts" || document.hidden) return;
    try {
      const stats = await get("v1/routing/stats");
      const layers = stats.layers.map(({ layer, visits }) => ({ layer, experts: visits.length }));
      const width = Math.max(0, ...layers.map(({ experts }) => experts));
      const visits = new Float64Array(layers.length * width);
      stats.layers.forEach((each, place) => visits.set(each.visits, place * width));
      this.#server.value = { layers, width, visits, tokens: stats.computed_tokens };
    } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      // What was shown stays; the next question tells whether the server is gone.
    }
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#ask(), EVERY_MS);
  }
}

/** Whether a routing is of a model with the layers that the server's has: only such add up. */
function fits(routing, info) {
  return routing && info && JSON.stringify(routing.layers) === JSON.stringify(info.layers);
}
