"""What commands share at a terminal: output, progress, Ctrl-C, texts given as files."""
