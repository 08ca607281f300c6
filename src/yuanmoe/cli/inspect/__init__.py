"""`yuanmoe inspect`: options and tables."""
