"""Checkpoints on their way to disk: streamed, resumable, and checked afterwards."""
