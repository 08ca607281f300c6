// The page of a yuanmoe server: puts its parts together. Everything it needs is in this folder, everything it asks for
// is this server's; what a model says is shown as text and never becomes markup.

import { announce, toast } from "./core/announce.js";
import { byId } from "./core/dom.js";
import { language, t, translate } from "./core/language.js";
import { remember, remembered } from "./core/remembered.js";
import { signal } from "./core/signal.js";
import { startTheme } from "./core/theme.js";
import { startComposer } from "./chat/composer.js";
import { startContext } from "./chat/context.js";
import { startFiles } from "./chat/files.js";
import { startModel } from "./chat/model.js";
import { startSettings } from "./chat/settings.js";
import { startShortcuts } from "./chat/shortcuts.js";
import { startDrawer, startSidebar } from "./chat/sidebar.js";
import { Transcript } from "./chat/transcript.js";
import { startWelcome } from "./chat/welcome.js";
import { startLens } from "./experts/lens.js";
import { startPanel } from "./experts/panel.js";
import { ServerError } from "./talk/api.js";
import { readInfo } from "./talk/info.js";
import { Session } from "./talk/session.js";

const session = new Session();
const view = signal(remembered("view") === "experts" ? "experts" : "chat");

function startLanguage() {
  language.watch((name) => {
    document.documentElement.lang = name === "zh" ? "zh-Hans" : name;
    remember("language", name);
    translate(document);
    announce("");
  });
}

function startView() {
  const radios = document.querySelectorAll('input[name="view"]');
  for (const radio of radios) radio.addEventListener("change", () => (view.value = radio.value));
  view.watch((name) => {
    for (const radio of radios) radio.checked = radio.value === name;
    document.body.dataset.view = name;
    remember("view", name);
  });
}

/** Asks what the server is; a server that cannot say is asked again when something may have changed. */
async function meetServer(openSettings) {
  if (session.info.value) return;
  try {
    session.info.value = await readInfo();
    document.title = session.info.value.model;
    document.body.classList.toggle("no-experts", session.info.value.layers.length === 0);
    if (session.info.value.layers.length === 0) view.value = "chat";
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    announce(t(`error.${error.kind}`));
    if (error.kind === "key") openSettings("key");
    const again = { label: t("offer.retry"), run: () => meetServer(openSettings) };
    toast(`${t(`error.${error.kind}`)} ${t(`advice.${error.kind}`)}`, again);
  }
}

/** What the buttons of messages do. Those that go away with what they do leave the focus where one would type next. */
function messageActions(openSettings) {
  const thenType = (run) => (...subject) => {
    run(...subject);
    // A touch screen would bring up its keyboard.
    if (matchMedia("(hover: hover)").matches) byId("question").focus();
  };
  return {
    edit: thenType((question, text) => session.edit(question, text)),
    regenerate: thenType((answer) => session.regenerate(answer)),
    retry: thenType((answer) => session.retry(answer)),
    goOn: thenType((answer) => session.write(answer)),
    choose: (message) => session.choose(message),
    room: (answer) => session.room(answer),
    leaveOut: thenType(async (answer) => {
      const asks = answer.status === "failed";
      await session.leaveOut(asks ? answer.parent : answer.id);
      if (asks) session.retry(answer);
    }),
    takeBack: thenType(() => session.takeBack()),
    newConversation: thenType(() => session.create()),
    openSettings: (answer) => openSettings(answer.error?.param),
    enterKey: () => openSettings("key"),
  };
}

async function start() {
  startTheme();
  startLanguage();
  startView();
  await session.start();
  const openSettings = startSettings(session, () => meetServer(openSettings));
  const { propose, insert } = startComposer(session, () => meetServer(openSettings));
  new Transcript(session, view, messageActions(openSettings));
  const sidebar = startSidebar(session);
  startDrawer("panel", "open-panel", "close-panel");
  startWelcome(session, propose);
  startModel(session);
  startContext(session);
  startFiles(session, insert);
  startShortcuts({ ...sidebar, question: () => byId("question").focus() });
  startLens(session);
  startPanel(session, view);
  session.kept.watch((kept) => kept || toast(t("notKept")));
  byId("question").focus();
  await meetServer(openSettings);
}

start();
