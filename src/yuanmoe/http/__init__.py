"""What every server of ours shares: who may ask, what a body may hold, how errors look. Not routes, not models."""
