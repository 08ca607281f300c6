"""Tensors in, tensors out: the arithmetic of the model, each fast path beside its plain reference."""
