"""Adapters beside the model that is served: named at the start, checked against their base, described to who asks.

A request names one in the place of the model; what the engine does then is `model/lora/multi_lora.py`'s.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from yuanmoe.checkpoint.adapters.adapter import Adapter, active_lora_parameters, check_source, described, open_adapter
from yuanmoe.checkpoint.open import OpenCheckpoint
from yuanmoe.config import ModelConfig
from yuanmoe.errors import ResourceError, UsageError
from yuanmoe.units import format_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """An adapter that requests may name."""

    fingerprint: str
    """Changes with what may change answers: the model's, and what was learned."""
    parameters: int
    active_parameters: float
    """Of these, at work for one token."""


def read_adapters(named: Sequence[str], source: OpenCheckpoint, model_id: str) -> dict[str, Adapter]:
    """The adapters that `NAME=DIRECTORY` each name, of which no weight of the model is needed but norms and routers.

    Raises UsageError for names that cannot be told apart, CheckpointError for what is no adapter of this model.
    """
    adapters: dict[str, Adapter] = {}
    for each in named:
        name, separator, path = each.partition("=")
        if not (separator and path and re.fullmatch(r"[\w.:/-]{1,64}", name)):
            raise UsageError(f"--adapter {each}: write NAME=DIRECTORY, such as poet=runs/poet/checkpoints/step-500")
        if name in (model_id, *adapters):
            taken = "the model's own name" if name == model_id else f"that of {adapters[name].place}"
            raise UsageError(f"--adapter {each}: {name} is {taken}; requests ask by name, choose another")
        adapters[name] = open_adapter(path)
        check_source(adapters[name], source)
    return adapters


def check_room(adapters: Mapping[str, Adapter], dtype: torch.dtype, free_bytes: int | None) -> int:
    """Bytes that the factors take for activations in `dtype`. Raises ResourceError where there is less."""
    needed = sum(tensor.numel() for each in adapters.values() for tensor in each.tensors.values()) * dtype.itemsize
    if free_bytes is not None and needed > free_bytes:
        raise ResourceError(
            f"{len(adapters)} adapters need {format_size(needed)} beside the model, {format_size(free_bytes)} are "
            "free; load fewer (--adapter), or train them at a lower rank (lora.rank)"
        )
    return needed


def offered(adapter: Adapter, config: ModelConfig, fingerprint: str) -> Offered:
    """What is said of an adapter of a model with that fingerprint."""
    digest = hashlib.sha256(json.dumps([fingerprint, described(adapter)], sort_keys=True).encode())
    for name in sorted(adapter.tensors):
        digest.update(adapter.tensors[name].contiguous().view(torch.uint8).numpy().data)
    return Offered(
        fingerprint="fp_" + digest.hexdigest()[:10],
        parameters=sum(tensor.numel() for tensor in adapter.tensors.values()),
        active_parameters=active_lora_parameters(config, adapter.settings),
    )
