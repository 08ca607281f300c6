"""Small adapters for tests: factors that are not zero, beside models of any kind."""

import torch

from small_models import random_model, small_config
from yuanmoe.checkpoint.adapters.adapter import Adapter, adaptable_matrices, adapter_of, base_of
from yuanmoe.config import ModelConfig
from yuanmoe.model.decoder import CausalLM
from yuanmoe.model.lora.attach import attach, new_factors
from yuanmoe.model.lora.targets import LoraSettings, targets


def settings(*roles: str, **changes) -> LoraSettings:
    values = {"targets": roles or ("q", "k", "v", "o", "experts"), "rank": 4, "alpha": 8.0}
    return LoraSettings(**{**values, **changes})


def adapted(
    config: ModelConfig | None = None,
    made: LoraSettings | None = None,
    *,
    b_std: float = 0.1,
    seed: int = 1,
    base: CausalLM | None = None,
) -> tuple[CausalLM, Adapter]:
    """A random model, or `base`, with an adapter, and that adapter; its B is random too (0 at the start: `b_std` 0)."""
    model, made = (base or random_model(config or small_config())).requires_grad_(False), made or settings()
    attach(model, factors(model, made, b_std=b_std, seed=seed), made)
    return model, adapter_of(model, made, base_of(model, "small"))


def factors(model: CausalLM, made: LoraSettings, *, b_std: float = 0.1, seed: int = 1) -> dict[str, torch.Tensor]:
    tensors = new_factors(targets(adaptable_matrices(model.config), made), made, seed)
    torch.manual_seed(seed)
    return {
        name: b_std * torch.randn_like(tensor) if name.endswith(".b") else tensor for name, tensor in tensors.items()
    }
