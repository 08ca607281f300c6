"""Several devices: how a training step is laid out over them, what it takes, and the best layout."""
