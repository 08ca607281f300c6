"""Batches to train on and to measure with: documents shuffled, mixed, and cut into windows."""
