"""`yuanmoe demo`: an answer, then the whole loop in stages."""
