"""Inference: token ids in, token ids out; sampling, and batches of sequences over the model's cache."""
