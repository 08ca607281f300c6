"""Checkpoints in every released format, read lazily, and written beside and renamed."""
