"""How evenly experts work."""
