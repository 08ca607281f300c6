// The dialog of one conversation's settings: system prompt, sampling, stop strings; and the API key of this tab.

import { byId, el } from "../core/dom.js";
import { apiKey, NUMBERS, sound } from "../keep/settings.js";

/** Returns what opens the dialog, at the field of that name if one is given. */
export function startSettings(session, saved) {
  const dialog = byId("settings");
  const open = (field) => {
    const form = settingsForm(session.current.value.head.settings, session.info.value);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      apiKey.set(form.elements.key.value.trim());
      session.configure(readForm(form));
      dialog.close();
      saved();
    });
    dialog.querySelector("form").replaceWith(form);
    dialog.showModal();
    form.elements[field]?.focus();
  };
  byId("close-settings").addEventListener("click", () => dialog.close());
  byId("open-settings").addEventListener("click", () => open());
  return open;
}

/** `info` is null where the server is not known yet: its adapters cannot be named then. */
function settingsForm(settings, info) {
  const system = el("textarea", { name: "system", rows: 3, value: settings.system });
  const stop = el("textarea", { name: "stop", rows: 2, value: settings.stop.map(escaped).join("\n") });
  const key = el("input", { name: "key", type: "password", autocomplete: "off", value: apiKey.get() });
  const numbers = Object.entries(NUMBERS).map(([name, range]) => numberField(name, range, settings[name]));
  return el(
    "form",
    { autocomplete: "off" },
    ...(info?.adapters.length ? [field("model", modelChoice(settings, info), "hint.model")] : []),
    field("system", system, "hint.system"),
    el("fieldset", {}, el("legend", { t: "sampling" }), el("p", { className: "note", t: "hint.sampling" }), ...numbers),
    field("stop", stop, "hint.stop"),
    field("key", key, "hint.key"),
    el("div", { className: "dialog-foot" }, el("button", { type: "submit", className: "primary", t: "save" })),
  );
}

function modelChoice({ model }, info) {
  const options = info.adapters.map((name) => el("option", { value: name, textContent: name, selected: name === model }));
  return el("select", { name: "model" }, el("option", { value: "", textContent: info.model }), ...options);
}

function numberField(name, { min, max, step }, value) {
  const input = el("input", { name, type: "number", min, max, step: "any", value: value ?? "", inputMode: "decimal" });
  if (step === 1) Object.assign(input, { step: 1, inputMode: "numeric" });
  return field(name, input, `hint.${name}`);
}

function field(name, input, hint) {
  input.id = `setting-${name}`;
  input.setAttribute("aria-describedby", `hint-${name}`);
  const label = el("label", { htmlFor: input.id, t: `setting.${name}` });
  return el("div", { className: "setting" }, label, input, el("p", { id: `hint-${name}`, className: "note", t: hint }));
}

function readForm({ elements }) {
  const settings = { model: elements.model?.value, system: elements.system.value };
  settings.stop = elements.stop.value.split("\n").filter(Boolean).map(unescaped);
  // An empty field is no number, and left out as such.
  for (const name of Object.keys(NUMBERS)) settings[name] = elements[name].valueAsNumber;
  return sound(settings);
}

/** Stop strings are written one a line, so a line break in one is written `\n`. */
const escaped = (text) => text.replaceAll("\\", "\\\\").replaceAll("\n", "\\n");
const unescaped = (text) => text.replace(/\\(n|\\)/g, (_, mark) => (mark === "n" ? "\n" : "\\"));
