// The side of the page: the list of conversations, export and import, and the choices of the page.

import { toast } from "../core/announce.js";
import { byId, el } from "../core/dom.js";
import { has, language, t } from "../core/language.js";
import { remember, remembered } from "../core/remembered.js";
import { theme } from "../core/theme.js";
import { startList } from "./list.js";

/** Returns what the keyboard does with it: {search, create, list}. */
export function startSidebar(session) {
  const drawer = startDrawer("sidebar", "open-sidebar", "close-sidebar", "scrim");
  const create = () => {
    session.create();
    drawer.close();
    byId("question").focus();
  };
  byId("new-conversation").addEventListener("click", create);
  startExchange(session);
  startChoices();
  const show = startList(session, () => drawer.close());
  session.heads.watch(show);
  session.current.watch(show);
  language.watch(show);
  const fold = startFolding();
  const list = () => (isDrawer() ? drawer.toggle() : fold());
  const search = () => {
    if (isDrawer()) drawer.open();
    else fold(false);
    byId("search").select();
  };
  return { search, create, list };
}

const isDrawer = () => byId("open-sidebar").checkVisibility();

/** Where there is room for the list it can be folded away; it stays so at the next visit. */
function startFolding() {
  const fold = (away = !document.body.classList.contains("folded")) => {
    document.body.classList.toggle("folded", away);
    remember("folded", away);
  };
  fold(remembered("folded") ?? false);
  return fold;
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
  const open = () => {
    set(true);
    closer.focus();
  };
  opener.addEventListener("click", open);
  closer.addEventListener("click", close);
  if (scrimId) byId(scrimId).addEventListener("click", close);
  const escape = (event) => {
    if (event.key !== "Escape" || !document.body.classList.contains(`${id}-open`)) return;
    // What is in front closes first: Escape stops no answer then.
    event.preventDefault();
    close();
  };
  document.addEventListener("keydown", escape, { capture: true });
  const toggle = () => (document.body.classList.contains(`${id}-open`) ? close() : open());
  return { open, close, toggle };
}

function startExchange(session) {
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
      toast(t("importFailed", { reason: t(has(`file.${error.code}`) ? `file.${error.code}` : "file.broken") }));
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
