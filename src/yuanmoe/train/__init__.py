"""Training: recipes, optimizer and schedule, one step, the loop around it, and checkpoints that it goes on from."""
