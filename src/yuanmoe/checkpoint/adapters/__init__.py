"""LoRA adapters as folders: saved, opened, merged into weights, written for PEFT."""
