"""What a run begins with: a model, LoRA beside a frozen one, data."""
