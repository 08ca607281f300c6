"""Where text comes from: named files and folders, Python sources, installed packages, records of every kind of file."""
