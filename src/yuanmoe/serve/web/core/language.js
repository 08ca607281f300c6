// What the page says, in the reader's language. One table a language; elements carry keys and change with the language.

import en from "../strings/en.js";
import zh from "../strings/zh.js";
import { signal } from "./signal.js";
import { remembered } from "./remembered.js";

const TABLES = { en, zh };

/** The first of the browser's languages that there is a table for. */
function browserLanguage() {
  const known = navigator.languages.map((tag) => tag.slice(0, 2).toLowerCase()).find((tag) => tag in TABLES);
  return known ?? "en";
}

const stored = remembered("language");
export const language = signal(stored in TABLES ? stored : browserLanguage());

/** The string of that key, `{name}` replaced by `values.name`. */
export function t(key, values = {}) {
  const text = TABLES[language.value][key];
  if (text === undefined) throw new Error(`no string ${key}`);
  return text.replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

/** Whether there is a string of that key. */
export const has = (key) => key in TABLES[language.value];

const PLACES = {
  t: (node, text) => (node.textContent = text),
  tLabel: (node, text) => {
    node.setAttribute("aria-label", text);
    // Where the name is not written it is shown to those who point at it.
    if (node.matches("button, select")) node.title = text;
  },
  tPlaceholder: (node, text) => (node.placeholder = text),
};

/** Puts the string of a key into a node, now and whenever the language changes. */
export function say(node, place, key) {
  node.dataset[place] = key;
  PLACES[place](node, t(key));
}

/** Says everything below `root` in the current language. */
export function translate(root) {
  for (const [place, put] of Object.entries(PLACES)) {
    const attribute = `data-${place.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`)}`;
    for (const node of root.querySelectorAll(`[${attribute}]`)) put(node, t(node.dataset[place]));
  }
}

const formats = new Map();

/** A number as the reader's language writes it; `options` are those of Intl.NumberFormat. */
export function number(value, options = { maximumFractionDigits: 0 }) {
  const key = language.value + JSON.stringify(options);
  if (!formats.has(key)) formats.set(key, new Intl.NumberFormat(language.value, options));
  // A line may not break between a number and its unit of ten thousands.
  return formats.get(key).format(value).replace(/(\d)(?=\p{Script=Han})/u, "$1\u2060");
}

/** The day of a time, as a heading of a list: today, yesterday, the date of this week, or the month. */
export function day(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  const ago = Math.ceil((midnight - time) / 86400000);
  if (ago <= 1) {
    const words = new Intl.RelativeTimeFormat(language.value, { numeric: "auto" }).format(-Math.max(ago, 0), "day");
    return words[0].toLocaleUpperCase() + words.slice(1);
  }
  const options = ago < 7 ? { weekday: "long" } : { month: "long", year: "numeric" };
  return new Intl.DateTimeFormat(language.value, options).format(time);
}

export const percent = (share, digits = 1) =>
  number(share, { style: "percent", minimumFractionDigits: digits, maximumFractionDigits: digits });

/** Three digits that matter, with a unit of thousands: 7.41 GFLOP, 1.2 TFLOP. */
export function flop(gigaflop) {
  const units = ["GFLOP", "TFLOP", "PFLOP", "EFLOP"];
  let unit = 0;
  for (; gigaflop >= 1000 && unit < units.length - 1; unit++) gigaflop /= 1000;
  if (gigaflop > 0 && gigaflop < 0.1) return `${number(gigaflop * 1000, { maximumSignificantDigits: 3 })} MFLOP`;
  return `${number(gigaflop, { maximumSignificantDigits: 3 })} ${units[unit]}`;
}
