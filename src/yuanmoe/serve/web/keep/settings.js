// How answers are asked for: the adapter, the numbers of the sampler with their ranges, the system prompt, the API key.
// Sources: the OpenAI API, and the extensions of this server (top_k, min_p, repetition_penalty). A value that is left
// empty is what the model's card advises, or the server's default.

import { remember, remembered } from "../core/remembered.js";

/** Field of the request: range and step of the number; the server has the last word on what it accepts. */
export const NUMBERS = {
  temperature: { min: 0, max: 2, step: 0.05 },
  top_p: { min: 0, max: 1, step: 0.01 },
  top_k: { min: 0, max: 1000, step: 1 },
  min_p: { min: 0, max: 1, step: 0.01 },
  repetition_penalty: { min: 0.1, max: 2, step: 0.01 },
  max_tokens: { min: 1, max: 1000000, step: 1 },
  seed: { min: 0, max: Number.MAX_SAFE_INTEGER, step: 1 },
};

const KINDS = ["chat", "completion"];

/** Settings of a first conversation: everything is the server's default. */
const EMPTY = { model: null, kind: null, system: "", stop: [], ...Object.fromEntries(Object.keys(NUMBERS).map((name) => [name, null])) };

/** Settings from anywhere, with what is not understood left out. */
export function sound(settings) {
  const good = { ...EMPTY };
  // The name of an adapter; without one it is the model itself.
  if (typeof settings?.model === "string" && settings.model) good.model = settings.model;
  if (KINDS.includes(settings?.kind)) good.kind = settings.kind;
  if (typeof settings?.system === "string") good.system = settings.system;
  if (Array.isArray(settings?.stop)) good.stop = settings.stop.filter((text) => typeof text === "string" && text);
  for (const name of Object.keys(NUMBERS)) if (Number.isFinite(settings?.[name])) good[name] = settings[name];
  return good;
}

/** What the last conversation was set to, for the next. */
export const lastSettings = () => sound(remembered("settings"));
export const rememberSettings = (settings) => remember("settings", settings);

/** The sampler's fields of a request that these settings mean, for the model that `info` describes. */
export function requestFields(settings, info) {
  const fields = {};
  for (const name of Object.keys(NUMBERS)) {
    const value = settings[name] ?? (info.advised.includes(name) ? info.sampling[name] : null);
    if (value !== null) fields[name] = value;
  }
  if (settings.stop.length) fields.stop = settings.stop;
  return fields;
}

const KEY = "yuanmoe.key";

/** The API key is kept for this tab alone, and only until it is closed. */
export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (key) => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY)),
};
