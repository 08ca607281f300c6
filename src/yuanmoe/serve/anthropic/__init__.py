"""Anthropic's Messages API over the same service, for editors and agents that speak it; no generation of its own."""
