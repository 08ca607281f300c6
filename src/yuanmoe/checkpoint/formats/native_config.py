"""The config.json of our own layout: the model, the dtype, and the official config.json that it came with.

{"format": "yuanmoe", "version": 1, "dtype": "bfloat16", "model": {fields of ModelConfig},
 "official": {the original config.json}, "official_head": true}

`official_head`: the official files held `lm_head.weight` although it equals the embedding.
Not here: the tensors, which are safetensors under the names of `mapping.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from yuanmoe.config import ModelConfig
from yuanmoe.errors import CheckpointError, ConfigError, UsageError

FORMAT = "yuanmoe"
ADAPTER_FORMAT = "yuanmoe-adapter"
"""Of a directory that holds no model, but what is put beside one (`adapter.py`)."""
VERSION = 1

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_SHORT = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
WEIGHT_DTYPES = tuple(_DTYPES.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What is kept of the official files, so that they can be written again as they were."""

    config: Mapping[str, Any] = field(default_factory=dict)
    """The original config.json; empty for a model that has none."""
    head_stored: bool = False
    """Whether the files held `lm_head.weight` although it equals the embedding."""


def parse_dtype(name: str) -> torch.dtype:
    """`bfloat16`, `bf16` and so on. Raises UsageError for anything but a weight's dtype."""
    return _parse(name, _DTYPES)


def parse_kv_dtype(name: str) -> torch.dtype:
    """The same for cached keys and values, which may be `int8` too."""
    return _parse(name, _DTYPES | {"int8": torch.int8})


def _parse(name: str, known: Mapping[str, torch.dtype]) -> torch.dtype:
    key = _SHORT.get(name, name)
    if key not in known:
        raise UsageError(f"unknown dtype {name!r}; known: {', '.join((*known, *_SHORT))}")
    return known[key]


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def native_config(config: ModelConfig, dtype: torch.dtype, origin: Origin) -> dict[str, Any]:
    """The content of config.json."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "dtype": dtype_name(dtype),
        "model": config.to_dict(),
        "official": dict(origin.config),
        "official_head": origin.head_stored,
    }


def read_native_config(path: Path, values: Mapping[str, Any]) -> tuple[ModelConfig, Origin]:
    """The inverse of `native_config`. Raises CheckpointError for a version that this package is too old for."""
    version = values.get("version")
    if version != VERSION:
        raise CheckpointError(
            f"{path} has version {version!r} of the native format, this package reads version {VERSION}; update it"
        )
    model, official = values.get("model"), values.get("official", {})
    if not isinstance(model, dict) or not isinstance(official, dict):
        raise ConfigError(
            "a native config.json needs an object 'model', which describes the model, and an object 'official'"
        )
    origin = Origin(config=official, head_stored=bool(values.get("official_head", False)))
    return ModelConfig.from_dict(model), origin
