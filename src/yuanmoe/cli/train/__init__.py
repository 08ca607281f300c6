"""`yuanmoe train` and `yuanmoe adapter`: options, the run as it is shown."""
