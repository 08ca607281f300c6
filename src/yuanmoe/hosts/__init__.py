"""Our model inside other people's engines."""
