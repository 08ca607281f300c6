// What an empty conversation shows: what this model is, in numbers of the server's and words of its card, and what to
// begin with.

import { byId, el } from "../core/dom.js";
import { language, number, say, t } from "../core/language.js";

const QUESTIONS = ["example1", "example2", "example3"];

/** `propose` puts a text into the composer. */
export function startWelcome(session, propose) {
  const show = () => {
    const info = session.info.value;
    const chat = session.kind === "chat";
    byId("welcome").replaceChildren(
      el("h2", {}, t(chat ? "welcome" : "welcomeText")),
      ...(info ? [el("p", {}, about(info)), ...card(info)] : []),
      el("div", { className: chat ? "examples" : "examples code-examples" }, ...examples(info, chat, propose)),
    );
    say(document.querySelector('input[value="chat"] + span'), "t", chat ? "viewChat" : "viewText");
    say(byId("question"), "tPlaceholder", chat ? "questionPlaceholder" : "textPlaceholder");
    byId("composer").classList.toggle("text", !chat);
  };
  for (const cause of [session.info, session.current, language]) cause.watch(show);
}

/** In the reader's language, or in the first that the card has. */
const spoken = (table) => table[language.value] ?? table.en ?? Object.values(table)[0];

function card({ limits, languages }) {
  const said = spoken(limits);
  const list = new Intl.ListFormat(language.value).format(languages);
  if (!said && !languages.length) return [];
  const known = languages.length ? t("languages", { list }) : "";
  return [el("p", { className: "limits" }, [said, known].filter(Boolean).join(" "))];
}

/** What the card suggests; a chat model without suggestions gets questions that suit any. */
function examples(info, chat, propose) {
  const suggested = (info && spoken(info.suggestions)) ?? [];
  const texts = suggested.length || !chat || !info ? suggested : QUESTIONS.map((key) => t(key));
  return texts.map((text) => el("button", { type: "button", className: "example", on: { click: () => propose(text) } }, text));
}

function about({ model, parameters, active, layers, chosen }) {
  const billions = (count) => number(count, { notation: "compact", maximumSignificantDigits: 3 });
  const numbers = { model, parameters: billions(parameters), active: billions(active), chosen };
  if (!layers.length) return t("aboutDense", numbers);
  const experts = Math.max(...layers.map((each) => each.experts));
  return t("aboutExperts", { ...numbers, experts, layers: layers.length });
}
