"""`yuanmoe plan`: options, and tables for one device and for a cluster."""
