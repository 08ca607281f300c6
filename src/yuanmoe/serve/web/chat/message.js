// One message of the transcript: its text, what can be done with it, and what went wrong with it.

import { copyButton } from "../core/clipboard.js";
import { el, iconButton } from "../core/dom.js";
import { say, t } from "../core/language.js";
import { MarkdownView } from "../markdown/view.js";
import { TokensView } from "../experts/tokens.js";
import { facts } from "./facts.js";
import { PlainView } from "./plain.js";
import { problem } from "./problem.js";

/** The views of a message; `actions` are the session's and the transcript's: see transcript.js. */
export function messageView(message, actions) {
  return message.role === "user" ? new QuestionView(message, actions) : new AnswerView(message, actions);
}

class QuestionView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.foot = el("div", { className: "actions" });
    this.body = el("div", { className: "bubble" }, message.content);
    this.node = el("li", { className: "question", data: { message: message.id } });
    this.edge = el("div");
    this.node.append(this.edge, el("span", { className: "unseen", t: "you" }), this.body, this.foot);
  }

  /** `first` says that the turns before this one are left out, `out` that this one is; `plain` shows it as code. */
  update({ busy, siblings, plain, first, out }) {
    const { message, actions } = this;
    this.body.classList.toggle("plain", plain);
    this.node.classList.toggle("left-out", out);
    this.edge.replaceChildren(...(first ? [edge(actions, busy)] : []));
    const edit = iconButton("edit", "edit", () => this.#edit(), { disabled: busy });
    this.foot.replaceChildren(...branches(message, siblings, actions, busy), copyButton(() => message.content), edit);
  }

  #edit() {
    const area = el("textarea", { value: this.message.content, label: "editQuestion", rows: 1 });
    const close = () => {
      form.replaceWith(this.body);
      this.foot.hidden = false;
      this.foot.querySelector("button:last-child")?.focus();
    };
    const send = () => {
      if (!area.value.trim()) return;
      close();
      this.actions.edit(this.message, area.value.trim());
    };
    const buttons = [
      el("button", { type: "button", className: "quiet", t: "cancel", on: { click: close } }),
      el("button", { type: "submit", className: "primary", t: "send" }),
    ];
    const form = el("form", { className: "edit" }, area, el("div", { className: "pair" }, ...buttons));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      send();
    });
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      } else if (submits(event)) {
        event.preventDefault();
        send();
      }
    });
    this.body.replaceWith(form);
    this.foot.hidden = true;
    area.focus();
  }
}

/** The line between the turns that are left out and those that the model is sent. */
function edge(actions, busy) {
  const back = el("button", { type: "button", className: "quiet", t: "takeBack", disabled: busy });
  back.addEventListener("click", actions.takeBack);
  return el("p", { className: "edge" }, el("span", { t: "leftOut" }), back);
}

/** Whether a key sends: Enter alone, and not the one that ends the spelling of a Chinese word. */
export function submits(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
}

const VIEWS = {
  tokens: (message) => new TokensView(message),
  plain: () => new PlainView(),
  prose: () => new MarkdownView(),
};

class AnswerView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.body = el("div", { className: "body" });
    this.waiting = el("p", { className: "waiting" }, el("i"), el("i"), el("i"));
    this.notes = el("div");
    this.foot = el("div", { className: "actions" });
    this.node = el("li", { className: "answer", data: { message: message.id } });
    this.node.append(el("span", { className: "unseen", t: "model" }), this.body, this.notes, this.foot);
  }

  /**
   * Shows the answer as `chat` or as `experts`; in a chat `plain` is the text as it is, else Markdown. `siblings` are the answers to the same question; while the session is
   * `busy` nothing else can be asked.
   */
  update({ view, busy, siblings, last, plain, out }) {
    this.kind = view === "experts" && this.message.routing ? "tokens" : (this.chosen ?? plain) ? "plain" : "prose";
    this.node.classList.toggle("left-out", out);
    this.body.classList.toggle("plain", plain);
    this.#show();
    this.#after(busy, siblings, last);
  }

  #show() {
    if (this.kind !== this.shown) {
      this.shown = this.kind;
      this.close();
      this.content = VIEWS[this.kind](this.message);
      this.body.replaceChildren(this.content.node);
    }
    this.grow();
  }

  /** Shows the text as it is, or as Markdown, until the conversation is left. */
  #switch() {
    this.chosen = this.kind !== "plain";
    this.kind = this.chosen ? "plain" : "prose";
    this.#show();
    say(this.foot.querySelector(".as"), "t", this.chosen ? "asMarkdown" : "asText");
  }

  #switchButton() {
    if (this.kind === "tokens" || !this.message.content) return [];
    const name = this.kind === "plain" ? "asMarkdown" : "asText";
    return [el("button", { type: "button", className: "quiet as", t: name, on: { click: () => this.#switch() } })];
  }

  /** Called when it is shown no more. */
  close() {
    this.content?.close?.();
  }

  /** What came since. */
  grow() {
    const { message } = this;
    const writes = message.status === "writing";
    this.content.update(message.content);
    this.node.ariaBusy = String(writes);
    this.node.classList.toggle("writing", writes && message.content !== "");
    const waits = writes && message.content === "";
    if (waits !== this.waiting.isConnected) waits ? this.body.append(this.waiting) : this.waiting.remove();
  }

  #after(busy, siblings, last) {
    const { message, actions } = this;
    this.notes.replaceChildren(...problem(message, actions, last && !busy));
    this.foot.hidden = message.status === "writing";
    this.foot.replaceChildren(
      ...branches(message, siblings, actions, busy),
      ...(message.content ? [copyButton(() => message.content)] : []),
      iconButton("again", "regenerate", () => actions.regenerate(message), { disabled: busy }),
      ...this.#switchButton(),
      facts(message) ?? "",
    );
  }
}

/** Steps through the messages that stand in the same place. */
function branches(message, siblings, actions, busy) {
  if (siblings.length < 2) return [];
  const at = siblings.indexOf(message);
  const step = (name, label, to) =>
    iconButton(name, label, () => actions.choose(siblings[to]), { disabled: busy || !siblings[to] });
  const place = el("span", { className: "place" }, t("branch", { at: at + 1, of: siblings.length }));
  return [step("left", "branchBefore", at - 1), place, step("right", "branchAfter", at + 1)];
}
