// The messages that are shown, in step with the session: rebuilt where the path changed, grown once a frame otherwise.

import { announce } from "../core/announce.js";
import { byId, oncePerFrame } from "../core/dom.js";
import { language, t } from "../core/language.js";
import { messageView } from "./message.js";

/** So close to the end, in pixels, the page follows the answer. */
const NEAR = 60;

export class Transcript {
  #views = new Map();
  #conversation = null;
  #wasWriting = false;
  /** Whether the end was in sight when the page was last shown or scrolled. */
  #atEnd = true;

  /** `view` is the signal of what is shown, chat or experts; `actions` what the buttons of messages call. */
  constructor(session, view, actions) {
    Object.assign(this, { session, view, actions });
    this.list = byId("transcript");
    this.scroller = byId("main");
    this.toEnd = byId("to-end");
    this.grow = oncePerFrame(() => this.#grow());
    session.current.watch(() => this.#show());
    session.info.watch(() => this.#show());
    session.touched.watch(() => this.grow());
    view.watch(() => {
      // The other view has other heights; whoever saw the end sees it there too.
      const follow = this.#atEnd;
      this.#show();
      if (follow) this.#scrollToEnd();
      this.#offerEnd();
    });
    language.watch(() => this.#show());
    this.scroller.addEventListener("scroll", () => this.#offerEnd(), { passive: true });
    this.toEnd.addEventListener("click", () => this.#scrollToEnd());
  }

  #show() {
    const conversation = this.session.current.value;
    const another = conversation !== this.#conversation;
    const follow = another || this.#nearEnd();
    if (another) this.#forget();
    this.#conversation = conversation;
    const { writing } = this.session;
    const busy = writing || this.session.info.value === null;
    const path = conversation.path();
    const out = path.length - conversation.sent(conversation.head.leaf).length;
    const plain = this.session.kind === "completion";
    byId("welcome").hidden = path.length > 0;
    for (const [at, message] of path.entries()) {
      if (!this.#views.has(message.id)) this.#views.set(message.id, messageView(message, this.actions));
      const siblings = conversation.siblings(message);
      const last = message === path.at(-1);
      this.#views.get(message.id).update({
        ...{ view: this.view.value, busy, siblings, last, plain },
        ...{ out: at < out, first: out > 0 && at === out },
      });
    }
    this.#place(path.map(({ id }) => this.#views.get(id).node));
    if (this.#wasWriting && !writing && !another) announce(t("answerEnded"));
    this.#wasWriting = writing;
    if (follow) this.#scrollToEnd();
    this.#offerEnd();
  }

  #forget() {
    for (const view of this.#views.values()) view.close?.();
    this.#views.clear();
  }

  /** Moves no node that is in its place: what has the focus keeps it. */
  #place(nodes) {
    for (const [at, node] of nodes.entries()) {
      if (this.list.children[at] !== node) this.list.insertBefore(node, this.list.children[at] ?? null);
    }
    while (this.list.children.length > nodes.length) this.list.lastChild.remove();
  }

  #grow() {
    const view = this.#views.get(this.session.touched.value?.id);
    if (!view?.node.isConnected) return;
    const follow = this.#nearEnd();
    view.grow();
    if (follow) this.#scrollToEnd();
    this.#offerEnd();
  }

  #nearEnd() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    return scrollHeight - scrollTop - clientHeight < NEAR;
  }

  #scrollToEnd() {
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  #offerEnd() {
    // An empty conversation has no end to go to.
    this.#atEnd = this.#nearEnd();
    this.toEnd.hidden = this.list.childElementCount === 0 || this.#atEnd;
  }
}
