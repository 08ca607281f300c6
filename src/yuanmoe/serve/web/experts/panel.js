// The panel beside the coloured answer: heat map, load and meter, up to date while it is seen.

import { byId, oncePerFrame } from "../core/dom.js";
import { language, number, t } from "../core/language.js";
import { theme } from "../core/theme.js";
import { HeatMap } from "./heat.js";
import { lens, lookAtUneven } from "./lens.js";
import { LoadView } from "./load.js";
import { showMeter } from "./meter.js";
import { Source } from "./source.js";

/** Ten times a second is as live as an eye can follow, and leaves the frames to the answer. */
const APART_MS = 100;

/** Starts the panel; `view` is the signal of what the page shows. */
export function startPanel(session, view) {
  const heat = new HeatMap();
  const load = new LoadView();

  const show = oncePerFrame(() => {
    const { info, current } = session;
    if (view.value !== "experts" || !info.value) return;
    const data = source.read();
    const note = data ? `sourceNote.${source.kind.value}` : "sourceEmpty";
    byId("source-note").textContent = t(note, { tokens: number(data?.tokens ?? 0) });
    if (data && !session.writing) lookAtUneven(data);
    heat.update(data);
    load.update(data);
    showMeter(info.value, current.value);
  }, APART_MS);

  const source = new Source(session, view, show);
  for (const cause of [lens, language, session.current, session.touched]) cause.watch(show);
  theme.watch(() => heat.restyle());
  for (const radio of document.querySelectorAll('input[name="source"]')) {
    radio.addEventListener("change", () => (source.kind.value = radio.value));
  }
}
