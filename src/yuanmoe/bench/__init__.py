"""How fast a model runs on this machine, and beside whom."""
