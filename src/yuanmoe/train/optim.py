"""Where training starts and how it moves, as a recipe says: random weights, AdamW (arXiv 1711.05101), its schedule."""

import math

import torch
from torch import nn

from yuanmoe.model.decoder import YuanForCausalLM
from yuanmoe.train.recipe import Recipe


def new_model(recipe: Recipe) -> YuanForCausalLM:
    """The recipe's model with random weights that depend on its seed alone."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(recipe.seed)
        model = YuanForCausalLM(recipe.model).initialize()
        if recipe.embedding_std is not None:
            nn.init.normal_(model.model.embed_tokens.weight, std=recipe.embedding_std)
    return model


def make_optimizer(model: YuanForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over four kinds of parameters; the key `rate` of a group is its multiple of the learning rate.

    Only matrices inside the layers decay: norms have nothing to shrink towards 0 for, and rare tokens' rows would do
    little else.
    """
    kinds = {
        "matrix": {"rate": 1.0, "weight_decay": recipe.weight_decay},
        "vector": {"rate": 1.0, "weight_decay": 0.0},
        "embedding": {"rate": recipe.embedding_rate, "weight_decay": 0.0},
        "head": {"rate": recipe.head_rate, "weight_decay": 0.0},
    }
    members: dict[str, list[nn.Parameter]] = {kind: [] for kind in kinds}
    for name, parameter in model.named_parameters():
        members[_kind(name, parameter)].append(parameter)
    groups = [{"params": members[kind], **settings} for kind, settings in kinds.items() if members[kind]]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)


def _kind(name: str, parameter: nn.Parameter) -> str:
    if name == "model.embed_tokens.weight":
        return "embedding"
    if name == "lm_head.weight":
        return "head"
    return "vector" if parameter.ndim == 1 else "matrix"


def learning_rate(recipe: Recipe, share: float) -> float:
    """After a share of the budget, 0 to 1: a linear rise, then half a cosine down."""
    if share < recipe.warmup:
        return recipe.learning_rate * share / recipe.warmup
    fallen = (share - recipe.warmup) / (1 - recipe.warmup) if recipe.warmup < 1 else 0.0
    above_final = 0.5 * (1 + math.cos(math.pi * fallen))
    return recipe.learning_rate * (recipe.final_learning_rate + (1 - recipe.final_learning_rate) * above_final)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value * group["rate"]
