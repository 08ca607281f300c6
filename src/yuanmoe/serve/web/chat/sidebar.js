// The list of conversations: open, rename, delete with a way back, export and import; and the choices of the page.

import { toast } from "../core/announce.js";
import { byId, el, iconButton } from "../core/dom.js";
import { language, t } from "../core/language.js";
import { theme } from "../core/theme.js";

export function startSidebar(session) {
  const drawer = startDrawer("sidebar", "open-sidebar", "close-sidebar", "scrim");
  byId("new-conversation").addEventListener("click", () => {
    session.create();
    drawer.close();
    byId("question").focus();
  });
  startFiles(session);
  startChoices();
  const show = () => showList(session, drawer);
  session.heads.watch(show);
  session.current.watch(show);
  language.watch(show);
}

/** A part of the page that slides in where it is narrow; Escape and the scrim close it. */
export function startDrawer(id, openId, closeId, scrimId) {
  const [opener, closer] = [openId, closeId].map(byId);
  const set = (open) => {
    document.body.classList.toggle(`${id}-open`, open);
    opener.setAttribute("aria-expanded", String(open));
    if (scrimId) byId(scrimId).hidden = !open;
  };
  const close = () => {
    if (!document.body.classList.contains(`${id}-open`)) return;
    set(false);
    opener.focus();
  };
  opener.addEventListener("click", () => {
    set(true);
    closer.focus();
  });
  closer.addEventListener("click", close);
  if (scrimId) byId(scrimId).addEventListener("click", close);
  const escape = (event) => {
    if (event.key !== "Escape" || !document.body.classList.contains(`${id}-open`)) return;
    // What is in front closes first: Escape stops no answer then.
    event.preventDefault();
    close();
  };
  document.addEventListener("keydown", escape, { capture: true });
  return { close };
}

function showList(session, drawer) {
  const shown = session.current.value.head.id;
  byId("title").textContent = session.current.value.head.title || t("newConversation");
  byId("conversations").replaceChildren(...session.heads.value.map((head) => entry(session, head, shown, drawer)));
}

function entry(session, head, shown, drawer) {
  const open = el("button", { type: "button", className: "title", title: head.title }, head.title || t("untitled"));
  if (head.id === shown) open.setAttribute("aria-current", "true");
  open.addEventListener("click", () => {
    session.open(head.id);
    drawer.close();
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

function startFiles(session) {
  const file = byId("import-file");
  byId("export").addEventListener("click", async () => {
    const address = URL.createObjectURL(new Blob([await session.export()], { type: "application/json" }));
    el("a", { href: address, download: "yuanmoe-conversations.json" }).click();
    URL.revokeObjectURL(address);
  });
  byId("import").addEventListener("click", () => file.click());
  file.addEventListener("change", async () => {
    try {
      toast(t("imported", { count: await session.import(await file.files[0].text()) }));
    } catch (error) {
      toast(t("importFailed", { reason: error.message }));
    }
    file.value = "";
  });
}

function startChoices() {
  const chooseLanguage = byId("language");
  chooseLanguage.value = language.value;
  chooseLanguage.addEventListener("change", () => (language.value = chooseLanguage.value));
  const chooseTheme = byId("theme");
  chooseTheme.value = theme.value;
  chooseTheme.addEventListener("change", () => (theme.value = chooseTheme.value));
}
