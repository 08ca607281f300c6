"""LoRA beside the matrices: which ones, what is attached to them, and several adapters in one pass."""
