// Small choices that outlive a visit, in localStorage. A browser that refuses storage forgets them, and all else works.

const PREFIX = "yuanmoe.";

export function remembered(name) {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + name));
  } catch {
    return null;
  }
}

export function remember(name, value) {
  try {
    localStorage.setItem(PREFIX + name, JSON.stringify(value));
  } catch {
    // A full or forbidden storage; the choice holds for this visit.
  }
}
