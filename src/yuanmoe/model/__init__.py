"""The Yuan 2.0 decoder: single-device arithmetic, nothing about files, text or training."""
