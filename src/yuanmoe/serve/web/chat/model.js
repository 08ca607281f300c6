// Who answers: the model's name in the header, or a choice where the server has adapters of it.

import { byId, el } from "../core/dom.js";

export function startModel(session) {
  const place = byId("who");
  const show = () => {
    const info = session.info.value;
    if (!info) return place.replaceChildren();
    if (!info.adapters.length) return place.replaceChildren(el("span", { id: "model" }, info.model));
    place.replaceChildren(choice(session, info));
  };
  session.info.watch(show);
  session.current.watch(show);
}

function choice(session, { model, adapters }) {
  const { settings } = session.current.value.head;
  // The model is written before the adapter, so that one reads what is combined.
  const names = [["", model], ...adapters.map((name) => [name, `${model} + ${name}`])];
  const options = names.map(([value, textContent]) => el("option", { value, textContent }));
  const select = el("select", { id: "model", label: "answersWith" }, ...options);
  select.value = adapters.includes(settings.model) ? settings.model : "";
  select.addEventListener("change", () => {
    session.configure({ ...session.current.value.head.settings, model: select.value || null });
    byId("model").focus();
  });
  return select;
}
