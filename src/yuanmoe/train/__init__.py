"""Training: a recipe, its optimizer and schedule, one step, and the loop around it."""
