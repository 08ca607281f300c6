"""The same model over 4-bit and 8-bit weights."""
