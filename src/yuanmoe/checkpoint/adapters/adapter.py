"""Adapters as directories: the factors of a few matrices, how they were made, and the base that they belong to.

| file | holds |
|---|---|
| config.json | `"format": "yuanmoe-adapter"`, the settings of LoRA, name and fingerprint of the base |
| adapter.safetensors | `NAME.a` and `NAME.b` for every adapted matrix NAME |

A base is known by its norms, biases and routers, rounded to bfloat16: those are kept whole in every precision, so that
what was learned on 4 bits also fits the weights that they were made of, and no two trained models share them.
Not here: factors at work (`model/lora/attach.py`), PEFT's format (`peft.py`), factors added to weights (`merge.py`).
"""

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from yuanmoe.checkpoint.files.lazy import TensorView
from yuanmoe.checkpoint.files.safetensors_file import open_safetensors
from yuanmoe.checkpoint.formats.mapping import EMBEDDING, HEAD, layout
from yuanmoe.checkpoint.formats.native_config import ADAPTER_FORMAT
from yuanmoe.checkpoint.open import OpenCheckpoint
from yuanmoe.checkpoint.write.writer import Contents, Written, write_checkpoint
from yuanmoe.config import ModelConfig
from yuanmoe.errors import CheckpointError, ConfigError
from yuanmoe.model.decoder import CausalLM
from yuanmoe.model.lora.attach import A, B, attach, factor_tensors
from yuanmoe.model.lora.targets import LoraSettings, Shape, factor_shapes, lora_role_of, num_parameters, targets
from yuanmoe.storage.json_file import read_json

VERSION = 1
TENSORS = "adapter.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The model that an adapter belongs to."""

    name: str
    """Of its directory, for messages."""
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter in memory, which may be attached to its base as often as one likes."""

    settings: LoraSettings
    base: Base
    tensors: dict[str, Tensor]
    place: str = "this adapter"
    """Where it came from, for messages."""


def adaptable_matrices(config: ModelConfig) -> dict[str, Shape]:
    """What can be adapted in such a model by name; the head also where it is the embedding."""
    shapes = layout(config).native
    named = {name: shape for name, shape in shapes.items() if len(shape) > 1 and lora_role_of(name)}
    return named | {HEAD: shapes[EMBEDDING]}


def adapted_shapes(adapter: Adapter) -> dict[str, Shape]:
    """The matrices that an adapter corrects, by the shapes of its factors. Raises CheckpointError for half a pair."""
    shapes = {}
    for name in dict.fromkeys(key.rpartition(".")[0] for key in adapter.tensors):
        a, b = (adapter.tensors.get(f"{name}.{part}") for part in (A, B))
        if a is None or b is None or a.ndim != b.ndim or a.ndim < 2:
            raise CheckpointError(f"{adapter.place}: the factors of {name} are no pair; {TENSORS} is damaged")
        shapes[name] = (*b.shape[:-1], a.shape[-1])
    return shapes


def active_lora_parameters(config: ModelConfig, settings: LoraSettings) -> float:
    """How many of them work for one token: of a stack the chosen experts' alone."""
    shapes = targets(adaptable_matrices(config), settings)
    chosen = config.num_experts_per_tok
    return sum(
        num_parameters(shape, settings.rank) * (chosen / shape[0] if len(shape) == 3 else 1)
        for shape in shapes.values()
    )


def fingerprint(config: ModelConfig, read: Callable[[str], Tensor]) -> str:
    """Of a model whose tensor of each name `read` gives."""
    digest = hashlib.sha256()
    for name, shape in layout(config).native.items():
        if len(shape) == 1 or ".router." in name:
            digest.update(f"{name} {list(shape)}".encode())
            digest.update(read(name).detach().cpu().bfloat16().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def base_of(model: CausalLM, name: str) -> Base:
    """What a model in memory is known by."""
    return Base(name=name, fingerprint=fingerprint(model.config, model.state_dict().__getitem__))


def adapter_of(model: CausalLM, settings: LoraSettings, base: Base) -> Adapter:
    """What is attached to a model, not copied."""
    return Adapter(settings=settings, base=base, tensors=factor_tensors(model))


def described(adapter: Adapter) -> dict[str, Any]:
    """The content of config.json."""
    return {
        "format": ADAPTER_FORMAT,
        "version": VERSION,
        "lora": dataclasses.asdict(adapter.settings) | {"targets": list(adapter.settings.targets)},
        "base": dataclasses.asdict(adapter.base),
        "parameters": sum(tensor.numel() for tensor in adapter.tensors.values()),
    }


def save_adapter(adapter: Adapter, dst: Path | str, **options: Any) -> Written:
    """Writes a directory, whole or not at all. `options` and errors are those of `writer.write_checkpoint`."""
    views = {name: TensorView.of(tensor) for name, tensor in adapter.tensors.items()}
    return write_checkpoint(dst, Contents(tensors={}, config=described(adapter), beside={TENSORS: views}), **options)


def open_adapter(path: Path | str) -> Adapter:
    """The adapter in a directory. Raises CheckpointError for what is none, or is damaged."""
    path = Path(path)
    file = path / "config.json"
    values = read_json(file) if file.is_file() else {}
    if values.get("format") != ADAPTER_FORMAT:
        raise CheckpointError(
            f'{path} is no adapter: {file} does not say "format": "{ADAPTER_FORMAT}"; an adapter is what '
            "yuanmoe train m32-lora writes into checkpoints"
        )
    if values.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has version {values.get('version')!r} of the format of adapters, this package reads {VERSION}; "
            "update it"
        )
    try:
        lora: dict[str, Any] = values["lora"]
        settings = LoraSettings(**{**lora, "targets": tuple(lora["targets"])})
        base = Base(**values["base"])
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{file} describes no adapter ({error}); it is damaged") from error
    stored = open_safetensors(path / TENSORS).tensors
    tensors = {name: tensor.read().clone() for name, tensor in stored.items()}
    adapter = Adapter(settings=settings, base=base, tensors=tensors, place=str(path))
    adapted_shapes(adapter)
    return adapter


def check_adapter_fits(adapter: Adapter, config: ModelConfig, found: str, name: str) -> None:
    """Raises CheckpointError unless an adapter belongs to the base of that configuration and fingerprint."""
    if adapter.base.fingerprint != found:
        raise CheckpointError(
            f"{adapter.place} belongs to {adapter.base.name} (fingerprint {adapter.base.fingerprint[:12]}), not to "
            f"{name} ({found[:12]}); give it the base that it was trained on, in any precision"
        )
    shapes = targets(adaptable_matrices(config), adapter.settings)
    expected = {}
    for target, shape in shapes.items():
        expected[f"{target}.{A}"], expected[f"{target}.{B}"] = factor_shapes(shape, adapter.settings.rank)
    stored = {name: tuple(tensor.shape) for name, tensor in adapter.tensors.items()}
    if stored != expected:
        wrong = sorted(key for key in {*stored, *expected} if stored.get(key) != expected.get(key))
        raise CheckpointError(
            f"{adapter.place}: {len(wrong)} tensors do not fit the model, such as {wrong[0]} "
            f"({stored.get(wrong[0])}, expected {expected.get(wrong[0])}); {TENSORS} is damaged"
        )


def check_source(adapter: Adapter, source: OpenCheckpoint) -> None:
    """The same for a base whose weights are still in their files, of which little is read."""
    found = fingerprint(source.config, lambda name: source.tensors[name].read())
    check_adapter_fits(adapter, source.config, found, str(source.path))


def attach_adapter(model: CausalLM, adapter: Adapter, name: str = "this model") -> None:
    """Puts an adapter to work in its base. Raises CheckpointError for another base."""
    check_adapter_fits(adapter, model.config, base_of(model, name).fingerprint, name)
    attach(model, adapter.tensors, adapter.settings)
