"""`yuanmoe doctor`: what this machine has."""
