"""How evenly experts work: how often each was chosen, and one formula for how even that is."""
