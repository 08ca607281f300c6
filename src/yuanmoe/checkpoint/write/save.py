"""Write a model in our layout or in the official one, from memory or straight from another checkpoint.

The official layout is written as safetensors, with a config.json that keeps every key of the one the model came with.
Not here: how a directory is written (`writer.py`), what the layouts are (`mapping.py`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from yuanmoe.checkpoint.files.lazy import LazyTensor, TensorView, cast, main_dtype
from yuanmoe.checkpoint.formats.mapping import EMBEDDING, HEAD, check_tensors, layout, to_official
from yuanmoe.checkpoint.formats.native_config import Origin, native_config
from yuanmoe.checkpoint.formats.official_config import official_config
from yuanmoe.checkpoint.open import OpenCheckpoint
from yuanmoe.checkpoint.write.writer import Contents, Extras, Facts, WriteOptions, Written, nothing, write_checkpoint
from yuanmoe.config import ModelConfig

Weights = OpenCheckpoint | Mapping[str, Tensor]
"""An open checkpoint, or a model's `state_dict()`."""

COMPANIONS = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""Small files that go with the weights into every layout."""


def save_native(
    weights: Weights,
    config: ModelConfig,
    dst: Path | str,
    *,
    dtype: torch.dtype | None = None,
    origin: Origin | None = None,
    companions: Path | None = None,
    **options: Unpack[WriteOptions],
) -> Written:
    """Write our layout: what loads without copying.

    `dtype` converts; without it every weight keeps its own. `origin` and the folder `companions`, from which tokenizer
    files are copied, are those of an open checkpoint unless given. Raises what `writer.write_checkpoint` raises, and
    CheckpointError for weights that do not belong to `config`.
    """
    tensors = _native(weights, config, dtype)
    described = native_config(config, main_dtype(tensors), _origin(weights, origin))
    return write_checkpoint(dst, contents_of(weights, tensors, described, companions), **options)


def save_official(
    weights: Weights,
    config: ModelConfig,
    dst: Path | str,
    *,
    dtype: torch.dtype | None = None,
    origin: Origin | None = None,
    companions: Path | None = None,
    **options: Unpack[WriteOptions],
) -> Written:
    """Write the official layout, bit for bit what was loaded from it; arguments as for `save_native`."""
    origin = _origin(weights, origin)
    native = _native(weights, config, dtype)
    tensors = to_official(layout(config), native)
    if config.tie_word_embeddings and origin.head_stored:
        tensors[HEAD] = tensors[EMBEDDING]
    described = official_config(config, main_dtype(native), origin.config, head_stored=origin.head_stored)
    return write_checkpoint(dst, contents_of(weights, tensors, described, companions), **options)


def _native(weights: Weights, config: ModelConfig, dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    """The weights under our names, in the order of the model, in `dtype`."""
    if isinstance(weights, OpenCheckpoint):
        tensors, place = weights.tensors, str(weights.path)
    else:
        tensors, place = {name: TensorView.of(tensor) for name, tensor in weights.items()}, "the state to save"
    shapes = layout(config).native
    check_tensors(place, shapes, tensors)
    return {name: cast(tensors[name], dtype, name) for name in shapes}


def _origin(weights: Weights, origin: Origin | None) -> Origin:
    return origin or (weights.origin if isinstance(weights, OpenCheckpoint) else Origin())


def contents_of(
    weights: Weights,
    tensors: Mapping[str, LazyTensor],
    described: Mapping[str, Any],
    companions: Path | None = None,
    facts: Facts = nothing,
    extras: Extras = nothing,
) -> Contents:
    """A directory of `tensors` that come from `weights`, under config.json `described`."""
    source = weights if isinstance(weights, OpenCheckpoint) else None
    folder = companions or (source.path if source else None)
    copies = [folder / name for name in COMPANIONS if (folder / name).is_file()] if folder else []
    if source is None:
        return Contents(tensors=tensors, config=described, copies=copies)
    return Contents(
        tensors=tensors,
        config=described,
        copies=copies,
        fingerprint=source.fingerprint(),
        release=source.release,
        facts=facts,
        extras=extras,
    )
