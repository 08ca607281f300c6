// A value that tells its listeners when it changes.

export function signal(value) {
  const listeners = new Set();
  return {
    get value() {
      return value;
    },
    set value(next) {
      if (Object.is(next, value)) return;
      value = next;
      this.changed();
    },
    /** Says that the inside of the value changed. */
    changed() {
      for (const listener of [...listeners]) listener(value);
    },
    /** Calls `listener` now and at every change; returns what ends that. */
    watch(listener) {
      listeners.add(listener);
      listener(value);
      return () => listeners.delete(listener);
    },
  };
}
