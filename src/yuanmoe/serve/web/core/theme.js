// Light or dark: the system's choice unless the reader made one. Every colour in the styles is a light-dark() pair.

import { remember, remembered } from "./remembered.js";
import { signal } from "./signal.js";

const stored = remembered("theme");

/** `system`, `light` or `dark`. */
export const theme = signal(["light", "dark"].includes(stored) ? stored : "system");

const system = matchMedia("(prefers-color-scheme: dark)");

export function startTheme() {
  theme.watch((choice) => {
    document.documentElement.dataset.theme = choice;
    remember("theme", choice);
  });
  // Whoever paints with computed colours paints again.
  system.addEventListener("change", () => theme.changed());
}
