// What an empty conversation shows: what this model is, in numbers of the server's, and some first questions.

import { byId, el } from "../core/dom.js";
import { language, number, t } from "../core/language.js";

const EXAMPLES = ["example1", "example2", "example3"];

/** `propose` puts a question into the composer. */
export function startWelcome(session, propose) {
  const show = () => {
    const examples = EXAMPLES.map((key) =>
      el("button", { type: "button", className: "example", on: { click: () => propose(t(key)) } }, t(key)),
    );
    const info = session.info.value;
    byId("welcome").replaceChildren(
      el("h2", {}, t("welcome")),
      ...(info ? [el("p", {}, about(info))] : []),
      el("div", { className: "examples" }, ...examples),
    );
  };
  session.info.watch(show);
  language.watch(show);
}

function about({ model, parameters, active, layers, chosen }) {
  const billions = (count) => number(count, { notation: "compact", maximumSignificantDigits: 3 });
  const numbers = { model, parameters: billions(parameters), active: billions(active), chosen };
  if (!layers.length) return t("aboutDense", numbers);
  const experts = Math.max(...layers.map((each) => each.experts));
  return t("aboutExperts", { ...numbers, experts, layers: layers.length });
}
