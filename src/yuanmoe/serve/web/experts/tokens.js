// An answer token by token, each in the colour of its expert. One stop for Tab; arrows go from token to token.

import { el } from "../core/dom.js";
import { language, number, t } from "../core/language.js";
import { cardIsShown, hideCard, showCard } from "./card.js";
import { lens, paint } from "./lens.js";

export class TokensView {
  #painted = 0;
  #lens = null;
  #active = null;

  constructor(message) {
    this.message = message;
    this.tokens = [];
    this.node = el("div", { className: "tokens", role: "group" });
    this.line = this.node.appendChild(el("div"));
    this.node.addEventListener("pointerover", (event) => this.#at(event.target, showCard));
    this.node.addEventListener("pointerleave", () => this.node.contains(document.activeElement) || hideCard());
    this.node.addEventListener("focusin", (event) => this.#at(event.target, showCard));
    this.node.addEventListener("focusout", hideCard);
    this.node.addEventListener("click", (event) => this.#at(event.target, ({ node }) => this.#activate(node)));
    this.node.addEventListener("keydown", (event) => this.#key(event));
    const stop = lens.watch(() => this.#repaint());
    const stopNames = language.watch(() => this.#name());
    this.close = () => [stop, stopNames].forEach((end) => end());
  }

  /** What came since the last call. */
  update() {
    const { surfaces, routing } = this.message;
    for (let at = this.tokens.length; at < surfaces.length; at++) this.#add(surfaces[at], at);
    this.#paint(this.#painted);
    this.#painted = routing.length;
    this.#name();
  }

  #add(surface, at) {
    const node = el("span", { className: "token", tabIndex: at === 0 ? 0 : -1, data: { at } }, visible(surface));
    this.#active ??= node;
    this.tokens.push(node);
    this.line.append(node);
    // Lines of their own keep a long answer's layout from being done anew with every token.
    if (surface.endsWith("\n")) this.line = this.node.appendChild(el("div"));
  }

  #name() {
    this.node.ariaLabel = t("tokensOf", { count: number(this.tokens.length) });
  }

  #repaint() {
    if (lens.value === this.#lens) return;
    this.#lens = lens.value;
    if (this.tokens.length) this.#paint(0);
  }

  #paint(from) {
    const { place, rank, spotlight } = lens.value;
    const { routing } = this.message;
    for (let at = from; at < Math.min(routing.length, this.tokens.length); at++) {
      const expert = routing.expert(at, place, rank);
      paint(this.tokens[at], expert);
      this.tokens[at].classList.toggle("dim", spotlight !== null && expert !== spotlight);
    }
  }

  #at(node, run) {
    const at = node.closest?.(".token")?.dataset.at;
    if (at !== undefined) run({ message: this.message, at: Number(at), node: this.tokens[at] });
  }

  #activate(node) {
    this.#active.tabIndex = -1;
    this.#active = node;
    node.tabIndex = 0;
    node.focus({ preventScroll: false });
  }

  #key(event) {
    if (event.key === "Escape" && cardIsShown()) {
      // The card closes first; another Escape stops the answer.
      event.preventDefault();
      return hideCard();
    }
    const at = Number(event.target.dataset.at);
    const next = this.tokens[this.#steps[event.key]?.(at)];
    if (!next) return;
    event.preventDefault();
    this.#activate(next);
  }

  #steps = {
    ArrowRight: (at) => at + 1,
    ArrowLeft: (at) => at - 1,
    ArrowDown: (at) => this.#line(at, 1),
    ArrowUp: (at) => this.#line(at, -1),
    Home: () => 0,
    End: () => this.tokens.length - 1,
  };

  /** The nearest token on the line below, or with step -1 above. */
  #line(at, step) {
    const here = this.tokens[at].getBoundingClientRect();
    const there = ({ top, bottom, left }) =>
      step > 0 ? top > here.bottom - 1 && left >= here.left : bottom < here.top + 1 && left <= here.left;
    let next = at + step;
    while (this.tokens[next] && !there(this.tokens[next].getBoundingClientRect())) next += step;
    return next;
  }
}

/** A token's text with its line breaks marked; one that only begins a character has none of its own. */
function visible(surface) {
  const marked = surface.replaceAll("\n", "\u21b5\n");
  // After the last one a new line of tokens begins anyway.
  return surface === "" ? "\u00b7" : marked.replace(/\n$/, "");
}
