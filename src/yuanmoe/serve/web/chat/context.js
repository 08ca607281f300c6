// The context meter under the question: how much of what the model can read the conversation takes.

import { byId } from "../core/dom.js";
import { language, number, percent, t } from "../core/language.js";
import { LEAST_ROOM, roomAfter, takenTokens } from "../talk/room.js";

/** From this share on there is an offer to leave out the oldest turns. */
const NEARLY_FULL = 0.75;

export function startContext(session) {
  const show = () => {
    const { info, current } = session;
    const taken = info.value && takenTokens(current.value);
    byId("context").hidden = !taken;
    if (!taken) return;
    const share = Math.min(1, taken / info.value.context);
    const values = { taken: number(taken), context: number(info.value.context), share: percent(share, 0) };
    byId("context-said").textContent = t("context.taken", values);
    byId("context-fill").style.width = `${100 * share}%`;
    byId("context").classList.toggle("full", share >= NEARLY_FULL);
    const { leaf } = current.value.head;
    const older = current.value.sent(leaf).filter(({ role }) => role === "user").length > 1;
    // Where nothing fits any more the answer itself offers it.
    const full = roomAfter(info.value, taken) < LEAST_ROOM;
    byId("leave-out").hidden = share < NEARLY_FULL || full || !older || session.writing;
  };
  for (const cause of [session.info, session.current, session.touched, language]) cause.watch(show);
  byId("leave-out").addEventListener("click", async () => {
    await session.leaveOut(session.current.value.head.leaf);
    byId("question").focus();
  });
}
