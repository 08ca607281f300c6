"""What a model costs and where it fits, from its configuration alone; no torch."""
