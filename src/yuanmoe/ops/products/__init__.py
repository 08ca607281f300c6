"""Products of tokens with matrices in every precision: one matrix, grouped by expert, packed, with LoRA beside."""
