// The list of conversations by day, and the search over it.

import { byId, el, iconButton } from "../core/dom.js";
import { toast } from "../core/announce.js";
import { day, t } from "../core/language.js";

/** Milliseconds without another letter, after which messages are searched. */
const PAUSE_MS = 150;

/** Keeps the list in step with the session; `opened` is called when one was chosen. */
export function startList(session, opened) {
  const search = byId("search");
  let found = null;
  let due = null;
  const show = () => showList(session, found, opened);
  search.addEventListener("input", () => {
    clearTimeout(due);
    due = setTimeout(async () => {
      const text = search.value.trim();
      const ids = text ? await session.find(text) : null;
      if (search.value.trim() !== text) return;
      found = ids;
      show();
    }, PAUSE_MS);
  });
  search.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowDown" && event.key !== "Enter") return;
    event.preventDefault();
    document.querySelector("#conversations .title")?.focus();
  });
  return show;
}

function showList(session, found, opened) {
  const shown = session.current.value.head.id;
  byId("title").textContent = session.current.value.head.title || t("newConversation");
  const heads = session.heads.value.filter(({ id }) => !found || found.has(id));
  const groups = Map.groupBy(heads, ({ updated }) => day(updated));
  const parts = [...groups].map(([name, some]) => {
    const entries = some.map((head) => entry(session, head, shown, opened));
    return el("section", {}, el("h2", {}, name), el("ul", {}, ...entries));
  });
  if (found && !heads.length) parts.push(el("p", { className: "note" }, t("nothingFound")));
  byId("conversations").replaceChildren(...parts);
}

function entry(session, head, shown, opened) {
  const open = el("button", { type: "button", className: "title", title: head.title }, head.title || t("untitled"));
  if (head.id === shown) open.setAttribute("aria-current", "true");
  open.addEventListener("click", () => {
    session.open(head.id);
    opened();
  });
  const item = el("li", { data: { conversation: head.id } }, open);
  const remove = async () => {
    const restore = await session.remove(head.id);
    toast(t("deleted", { title: head.title }), { label: t("undo"), run: restore });
  };
  item.append(iconButton("edit", "rename", () => rename(session, head, item)), iconButton("delete", "delete", remove));
  return item;
}

function rename(session, head, item) {
  const input = el("input", { value: head.title, label: "renameTo", maxLength: 200 });
  const children = [...item.children];
  let done = false;
  const end = (keep) => {
    if (done) return;
    done = true;
    if (keep && input.value.trim()) session.rename(head.id, input.value.trim());
    else item.replaceChildren(...children);
  };
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.isComposing) end(true);
    else if (event.key === "Escape") {
      event.preventDefault();
      event.stopPropagation();
      end(false);
      children[1].focus();
    }
  });
  input.addEventListener("blur", () => end(true));
  item.replaceChildren(input);
  input.select();
}
