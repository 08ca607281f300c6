"""Steps of a run: gradient, optimizer, schedule, balance of experts, and the loop around them."""
