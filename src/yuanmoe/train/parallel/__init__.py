"""A run on several ranks: who holds what, and how they meet."""
