"""The model that a run of LoRA adapts: a frozen base in any precision, with factors beside it that learn.

The base is mapped where its files are what memory needs, and never saved; what learns are float32 factors, whatever
the base computes in. Not here: where factors go (`model/lora/attach.py`), their files
(`checkpoint/adapters/adapter.py`).
"""

import dataclasses
from pathlib import Path

import torch

from yuanmoe.checkpoint.adapters.adapter import Base, adaptable_matrices, base_of, check_adapter_fits, open_adapter
from yuanmoe.checkpoint.formats.native_config import parse_dtype
from yuanmoe.checkpoint.load import load_model
from yuanmoe.checkpoint.open import OpenCheckpoint
from yuanmoe.model.decoder import CausalLM
from yuanmoe.model.lora.attach import attach, new_factors
from yuanmoe.model.lora.targets import targets
from yuanmoe.train.recipe.recipe import Recipe
from yuanmoe.train.start.model import prepared


def adapted_model(
    recipe: Recipe, source: OpenCheckpoint, device: torch.device | str = "cpu", resumed_from: Path | None = None
) -> tuple[CausalLM, Base]:
    """The base in `source` with new factors, or with those of a checkpoint; and what the base is known by.

    Quantized weights stay so, with activations in the dtype of inference. Raises UsageError for a target that matches
    nothing and CheckpointError for a checkpoint of another base.
    """
    assert recipe.lora is not None, "there is something to attach"
    wanted, stored = recipe.model, source.config
    fields = (field.name for field in dataclasses.fields(wanted))
    changes = {name: getattr(wanted, name) for name in fields if getattr(wanted, name) != getattr(stored, name)}
    dtype = parse_dtype(recipe.run.dtype) if source.precision is None else None
    shapes = targets(adaptable_matrices(wanted), recipe.lora)
    model = load_model(source.path, dtype=dtype, device=device, **changes).requires_grad_(False)
    base = base_of(model, source.path.resolve().name)
    if resumed_from is None:
        tensors = new_factors(shapes, recipe.lora, recipe.run.seed)
    else:
        adapter = open_adapter(resumed_from)
        check_adapter_fits(adapter, wanted, base.fingerprint, base.name)
        tensors = adapter.tensors
    attach(model, tensors, recipe.lora, torch.float32)
    return prepared(model, recipe.run), base
