"""Datasets of tokens on disk: ours, Megatron's, opened, described and verified."""
