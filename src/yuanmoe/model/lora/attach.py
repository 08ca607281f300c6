"""Factors put beside the matrices of a model and taken away again; the weights themselves are never touched.

`attach` fills the places that the layers have for them (`low_rank.py`), `detach` empties them, so a model without an
adapter computes what it did before there was one, bit for bit. Experts' factors are stacked like the experts, and run
on the grouped path. Source: LoRA, arXiv 2106.09685. Not here: files, and which base they fit
(`checkpoint/adapters/adapter.py`). Legend: R rank, O outputs, I inputs, E experts.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from yuanmoe.model.decoder import CausalLM
from yuanmoe.model.lora.low_rank import LowRank
from yuanmoe.model.lora.targets import HEAD, LoraSettings, Shape, factor_shapes

A, B = "a", "b"
_HEAD_SLOT = "head_lora"
_SLOT, _STACK_SLOT = "lora", "_lora"


def new_factors(targets: Mapping[str, Shape], settings: LoraSettings, seed: int) -> dict[str, Tensor]:
    """The start of every adapter: A uniform within sqrt(3 / I) of 0, as wide as its inputs, and B zero.

    float32, named as `factor_tensors` names them; the numbers depend on `seed` alone.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in targets.items():
        a, b = factor_shapes(shape, settings.rank)
        bound = math.sqrt(3 / a[-1])
        tensors[f"{name}.{A}"] = torch.empty(a).uniform_(-bound, bound, generator=generator)
        tensors[f"{name}.{B}"] = torch.zeros(b)
    return tensors


def attach(
    model: CausalLM, tensors: Mapping[str, Tensor], settings: LoraSettings, dtype: torch.dtype | None = None
) -> None:
    """Puts factors beside the matrices that they are named after, in the place of any others.

    They are copied to the model's device, in `dtype` or, by default, that of its activations.
    """
    detach(model)
    for name, low_rank in low_ranks(model, tensors, settings, dtype).items():
        owner, slot = place_of(model, name)
        setattr(owner, slot, low_rank.train(model.training))


def low_ranks(
    model: CausalLM, tensors: Mapping[str, Tensor], settings: LoraSettings, dtype: torch.dtype | None = None
) -> dict[str, LowRank]:
    """The factors by the name of the matrix that they correct, copied as `attach` does, and beside no matrix yet."""
    norm = model.model.norm.weight
    placed = {name: tensor.to(norm.device, dtype or norm.dtype, copy=True) for name, tensor in tensors.items()}
    return {
        name: LowRank(placed[f"{name}.{A}"], placed[f"{name}.{B}"], settings.scale, settings.dropout)
        for name in _adapted(tensors)
    }


def detach(model: CausalLM) -> None:
    """Takes all factors away."""
    for name in attached(model):
        owner, slot = place_of(model, name)
        setattr(owner, slot, None)


def attached(model: CausalLM) -> dict[str, LowRank]:
    """The factors of a model by the name of the matrix that they correct."""
    found = ((path, module) for path, module in model.named_modules() if isinstance(module, LowRank))
    return {_target(path): module for path, module in found}


def factor_tensors(model: CausalLM) -> dict[str, Tensor]:
    """The same as tensors: `model.layers.0.self_attn.q_proj.weight.a` and so on, not copied."""
    factors = attached(model).items()
    return {f"{name}.{part}": tensor for name, low_rank in factors for part, tensor in low_rank.state_dict().items()}


def _adapted(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name.removesuffix(f".{A}") for name in tensors if name.endswith(f".{A}")]


def place_of(model: nn.Module, target: str) -> tuple[nn.Module, str]:
    """The module that has a matrix, and the attribute for the factors beside it."""
    if target == HEAD:  # no module of its own where the head is the embedding
        return model, _HEAD_SLOT
    path, _, name = target.rpartition(".")
    return model.get_submodule(path), _SLOT if name == "weight" else name + _STACK_SLOT


def _target(path: str) -> str:
    """The inverse of `place_of`, for the path of the factors."""
    if path == _HEAD_SLOT:
        return HEAD
    owner, _, slot = path.rpartition(".")
    return f"{owner}.weight" if slot == _SLOT else f"{owner}.{slot.removesuffix(_STACK_SLOT)}"
