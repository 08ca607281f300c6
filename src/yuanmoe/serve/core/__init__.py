"""Between HTTP and the engine: the thread that owns it, settings, keys, limits, metrics. No shapes of an API."""
