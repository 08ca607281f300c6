// Where the tokens of one answer went: experts and weights of every token in every layer, and visits of each expert.
//
// The server sends them as they are computed, in `{start, shape: [N, L, K], expert_bits, experts, weights}`: rows of
// base64 for consecutive positions of the sequence, `start` the first. The first position is the prompt's last token.
// Legend: N tokens, L layers with experts, K chosen, E experts of the largest layer.

const FULL_WEIGHT = 65535;

export class Routing {
  #experts = new Uint16Array(0);
  #weights = new Uint16Array(0);
  /** Position in the sequence of the answer's first token. */
  #origin = null;
  #resumed = 0;

  /** `layers` are {layer, experts} of those that have experts, `chosen` is K. */
  constructor({ layers, chosen }) {
    this.layers = layers;
    this.chosen = chosen;
    /** Tokens whose way is known; the last of an answer has none when no pass read it. */
    this.length = 0;
    this.width = Math.max(0, ...layers.map(({ experts }) => experts));
    /** Visits [L, E], in rows. */
    this.visits = new Uint32Array(layers.length * this.width);
  }

  /** The next data goes on after that many tokens of the answer: another request, other positions. */
  resumeAt(tokens) {
    this.#origin = null;
    this.#resumed = tokens;
  }

  append({ start, shape: [count, layers, chosen], expert_bits: bits, experts, weights }) {
    if (layers !== this.layers.length || chosen !== this.chosen) throw new Error("the routing is of another model");
    this.#origin ??= start + 1 - this.#resumed;
    const row = layers * chosen;
    const ids = bits === 8 ? bytes(experts) : new Uint16Array(bytes(experts).buffer);
    const shares = new Float32Array(bytes(weights).buffer);
    for (let at = 0; at < count; at++) {
      const token = start + at - this.#origin;
      // What is before the answer is not of it, and what is known already is not counted twice.
      if (token === this.length) this.#put(token, ids.subarray(at * row, (at + 1) * row), shares.subarray(at * row));
    }
  }

  #put(token, experts, weights) {
    const row = experts.length;
    this.#reserve((token + 1) * row);
    this.#experts.set(experts, token * row);
    for (let at = 0; at < row; at++) this.#weights[token * row + at] = Math.round(weights[at] * FULL_WEIGHT);
    this.length = token + 1;
    this.#count(token);
  }

  #count(token) {
    const row = this.layers.length * this.chosen;
    for (let at = 0; at < row; at++) {
      const layer = Math.floor(at / this.chosen);
      this.visits[layer * this.width + this.#experts[token * row + at]]++;
    }
  }

  #reserve(size) {
    if (size <= this.#experts.length) return;
    const grown = Math.max(size, 2 * this.#experts.length);
    for (const [old, put] of [
      [this.#experts, (array) => (this.#experts = array)],
      [this.#weights, (array) => (this.#weights = array)],
    ]) {
      const array = new Uint16Array(grown);
      array.set(old);
      put(array);
    }
  }

  /** What a token visited in the layer at that place: [{expert, weight}], best first; null where it is not known. */
  of(token, place) {
    if (token >= this.length) return null;
    const from = (token * this.layers.length + place) * this.chosen;
    return Array.from({ length: this.chosen }, (_, at) => ({
      expert: this.#experts[from + at],
      weight: this.#weights[from + at] / FULL_WEIGHT,
    }));
  }

  /** The expert that gives a token its colour; `rank` is a place in the order, or `strongest`. */
  expert(token, place, rank) {
    const visited = this.of(token, place) ?? [];
    if (rank === "strongest") visited.sort((one, other) => other.weight - one.weight);
    return visited[rank === "strongest" ? 0 : rank]?.expert ?? null;
  }

  /** Plain data, for the database and for files. */
  toJSON() {
    const size = this.length * this.layers.length * this.chosen;
    const { layers, chosen, length } = this;
    const [experts, weights] = [this.#experts, this.#weights].map((array) => base64(array.slice(0, size)));
    return { layers, chosen, length, experts, weights };
  }

  /** The inverse of `toJSON`. Raises an Error for anything else. */
  static from(saved) {
    const routing = new Routing(saved);
    const size = saved.length * saved.layers.length * saved.chosen;
    routing.#experts = new Uint16Array(bytes(saved.experts).buffer);
    routing.#weights = new Uint16Array(bytes(saved.weights).buffer);
    if (routing.#experts.length !== size || routing.#weights.length !== size) throw new Error("a damaged routing");
    if (routing.#experts.some((expert) => expert >= routing.width)) throw new Error("a damaged routing");
    routing.length = saved.length;
    for (let token = 0; token < saved.length; token++) routing.#count(token);
    return routing;
  }
}

const bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));

/** In pieces, because a call takes a bounded number of arguments. */
function base64(array) {
  const all = new Uint8Array(array.buffer);
  const pieces = [];
  for (let at = 0; at < all.length; at += 4096) pieces.push(String.fromCharCode(...all.subarray(at, at + 4096)));
  return btoa(pieces.join(""));
}
