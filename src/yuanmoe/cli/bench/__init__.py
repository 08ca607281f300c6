"""`yuanmoe bench`: options and tables."""
