// The dialog of one conversation's settings: system prompt, sampling, stop strings; and the API key of this tab.

import { byId, el } from "../core/dom.js";
import { number, t } from "../core/language.js";
import { apiKey, NUMBERS, sound } from "../keep/settings.js";
import { kindOf } from "../talk/prompt.js";
import { answerLimit } from "../talk/room.js";

/** Returns what opens the dialog, at the field of that name if one is given. */
export function startSettings(session, saved) {
  const dialog = byId("settings");
  const open = (field) => {
    const form = settingsForm(session.current.value.head.settings, session.info.value);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (!checked(form)) return;
      apiKey.set(form.elements.key.value.trim());
      session.configure(readForm(form, session.current.value.head.settings));
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

/** `info` is null where the server is not known yet: its defaults cannot be shown then. */
function settingsForm(settings, info) {
  const system = el("textarea", { name: "system", rows: 3, value: settings.system });
  const stop = el("textarea", { name: "stop", rows: 2, value: settings.stop.map(escaped).join("\n") });
  const key = el("input", { name: "key", type: "password", autocomplete: "off", value: apiKey.get() });
  const numbers = Object.entries(NUMBERS).map(([name, range]) => numberField(name, range, settings[name], info));
  return el(
    "form",
    { autocomplete: "off", noValidate: true },
    // A model that continues texts reads the text alone.
    ...(kindOf(info, settings) === "chat" ? [field("system", system, "hint.system")] : []),
    el("fieldset", {}, el("legend", { t: "sampling" }), ...presets(), ...numbers),
    field("stop", stop, "hint.stop"),
    field("kind", kindChoice(settings, info), "hint.kind"),
    field("key", key, "hint.key"),
    el("div", { className: "dialog-foot" }, el("button", { type: "submit", className: "primary", t: "save" })),
  );
}

/** Whether the model answers or continues texts: as its card says, or as the reader knows better. */
function kindChoice({ kind }, info) {
  const option = (value, textContent) => el("option", { value, textContent, selected: value === (kind ?? "") });
  const names = { chat: t("kind.chat"), completion: t("kind.completion") };
  const byCard = t("kind.card", { kind: names[info?.kind ?? "chat"] });
  return el("select", { name: "kind" }, option("", byCard), option("chat", names.chat), option("completion", names.completion));
}

/** Values for the whole sampler at once; an empty one is all defaults. */
const PRESETS = {
  advised: {},
  precise: { temperature: 0 },
  varied: { temperature: 1, top_p: 0.95 },
};

function presets() {
  const apply = ({ currentTarget }, values) => {
    const { elements } = currentTarget.form;
    for (const name of SAMPLER) elements[name].value = values[name] ?? "";
  };
  const buttons = Object.entries(PRESETS).map(([name, values]) =>
    el("button", { type: "button", className: "quiet", t: `preset.${name}`, on: { click: (event) => apply(event, values) } }),
  );
  return [el("div", { className: "presets" }, el("p", { className: "note", t: "hint.sampling" }), ...buttons)];
}

const SAMPLER = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty"];

function numberField(name, { min, max, step }, value, info) {
  const input = el("input", { name, type: "number", min, max, step: "any", value: value ?? "", inputMode: "decimal" });
  if (step === 1) Object.assign(input, { step: 1, inputMode: "numeric" });
  input.placeholder = defaultOf(name, info);
  return field(name, input, `hint.${name}`);
}

/** What an empty field means. */
function defaultOf(name, info) {
  if (name === "seed") return t("default.seed");
  if (!info) return "";
  if (name === "max_tokens") return number(answerLimit(info));
  const value = number(info.sampling[name], { maximumFractionDigits: 3 });
  return info.advised.includes(name) ? t("default.advised", { value }) : value;
}

/** Whether all numbers can be meant; says beside each what is wrong, in the page's language. */
function checked({ elements }) {
  const wrong = Object.keys(NUMBERS).filter((name) => {
    const input = elements[name];
    const { badInput, rangeUnderflow, rangeOverflow, stepMismatch } = input.validity;
    const { min, max } = NUMBERS[name];
    const said = badInput || rangeUnderflow || rangeOverflow ? "invalid.range" : stepMismatch ? "invalid.whole" : null;
    const limits = { min: number(min, { maximumFractionDigits: 2 }), max: number(max) };
    const note = input.parentElement.querySelector(".invalid");
    note.textContent = said ? t(said, limits) : "";
    input.setAttribute("aria-invalid", String(said !== null));
    return said;
  });
  elements[wrong[0]]?.focus();
  return !wrong.length;
}

function field(name, input, hint) {
  input.id = `setting-${name}`;
  input.setAttribute("aria-describedby", `hint-${name}`);
  const label = el("label", { htmlFor: input.id, t: `setting.${name}` });
  return el("div", { className: "setting" }, label, input, el("div", { id: `hint-${name}` }, el("p", { className: "invalid", role: "alert" }), el("p", { className: "note", t: hint })));
}

/** The settings of the form; what it does not show stays as it was. */
function readForm({ elements }, before) {
  const settings = { ...before, kind: elements.kind.value };
  if (elements.system) settings.system = elements.system.value;
  settings.stop = elements.stop.value.split("\n").filter(Boolean).map(unescaped);
  // An empty field is no number, and left out as such.
  for (const name of Object.keys(NUMBERS)) settings[name] = elements[name].valueAsNumber;
  return sound(settings);
}

/** Stop strings are written one a line, so a line break in one is written `\n`. */
const escaped = (text) => text.replaceAll("\\", "\\\\").replaceAll("\n", "\\n");
const unescaped = (text) => text.replace(/\\(n|\\)/g, (_, mark) => (mark === "n" ? "\n" : "\\"));
