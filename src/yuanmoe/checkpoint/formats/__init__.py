"""Released layouts and ours: configurations, names, packed weights. Both ways, bit for bit."""
