"""Open a checkpoint of any released format, and see its tensors under our names without reading them.

| directory | how it is told |
|---|---|
| native, quantized or not | config.json says `"format": "yuanmoe"` |
| Megatron | latest_checkpointed_iteration.txt, `iter_*` or `mp_rank_*` |
| GPTQ | quantization_config in config.json, or quantize_config.json |
| official, dense and MoE | config.json and weights |

Everything that can be known without reading weights is checked when the checkpoint is opened: names, shapes, dtypes.
Not here: reading into memory (`load.py`), writing (`save.py`).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from yuanmoe.checkpoint.files.lazy import LazyTensor, StoredTensor, Weights, main_dtype
from yuanmoe.checkpoint.files.mapped import MappedBytes
from yuanmoe.checkpoint.files.shards import open_weights
from yuanmoe.checkpoint.formats.gptq import packed_tensors
from yuanmoe.checkpoint.formats.mapping import EMBEDDING, HEAD, check_tensors, layout, to_native
from yuanmoe.checkpoint.formats.megatron import is_megatron, megatron_fields, open_megatron
from yuanmoe.checkpoint.formats.native_config import ADAPTER_FORMAT, FORMAT, Origin, parse_dtype, read_native_config
from yuanmoe.checkpoint.formats.official_config import official_fields
from yuanmoe.checkpoint.formats.packed_weight import packed_formats, packed_weights, read_record
from yuanmoe.config import ModelConfig
from yuanmoe.errors import CheckpointError, ConfigError, UsageError
from yuanmoe.plan.cost import Precision
from yuanmoe.shipped import model_folder
from yuanmoe.storage.json_file import read_json

Format = Literal["native", "official", "gptq", "megatron"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenCheckpoint:
    """An open checkpoint. `tensors` have our names; reading one touches only its own bytes."""

    path: Path
    format: Format
    config: ModelConfig
    tensors: Mapping[str, LazyTensor]
    stored: Mapping[str, LazyTensor]
    """The same under the names of the layout that it is stored in; packed ones (`gptq.PackedTensor`) with codes."""
    origin: Origin
    files: tuple[MappedBytes, ...]
    precision: Precision | None = None
    """Of our quantized weights, which are `packed_weight.PackedWeight`s; None where every tensor is stored whole."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most of the weights."""
        return main_dtype(self.tensors)

    def release(self) -> None:
        """Give the memory of the pages read so far back; call it while streaming. Not for tensors that are kept."""
        for file in self.files:
            file.release()

    def fingerprint(self) -> str:
        """A digest of what is there: the files' names, sizes and times, and the configuration."""
        files = []
        for path in (path for file in self.files for path in file.paths):
            status = path.stat()
            files.append([str(path.relative_to(self.path)), status.st_size, status.st_mtime_ns])
        facts = [files, self.config.to_dict(), dict(self.origin.config), self.origin.head_stored]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def open_checkpoint(path: Path | str, *, ignore_unknown: bool = False) -> OpenCheckpoint:
    """The checkpoint in a directory; `small` is the shipped one.

    `ignore_unknown` goes on where config.json has keys, or the files have tensors, that this package does not know.
    Raises CheckpointError, UnsafePickleError or ConfigError, each naming the file and what is wrong with it.
    """
    path = model_folder(path)
    if not path.is_dir():
        fault = "is a file; give its directory" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {fault}")
    with _named(path):
        return _open(path, ignore_unknown)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """What is wrong with a configuration is said with its file; Megatron shards carry theirs themselves."""
    try:
        yield
    except ConfigError as error:
        file = path / "config.json"
        raise ConfigError(f"{file if file.exists() else path}: {error}") from error


def _open(path: Path, ignore_unknown: bool) -> OpenCheckpoint:
    config_file = path / "config.json"
    values = read_json(config_file) if config_file.is_file() else {}
    if values.get("format") == FORMAT:
        return _open_native(path, values)
    if values.get("format") == ADAPTER_FORMAT:
        raise CheckpointError(f"{path} is an adapter, no model; give its base as the model, and it with --adapter")
    if is_megatron(path):
        checkpoint = open_megatron(path)
        fields = official_fields(values, ignore_unknown=ignore_unknown) if values else megatron_fields(checkpoint)
        return _open_official(path, "megatron", fields, checkpoint.weights, values, ignore_unknown)
    if not values:
        raise CheckpointError(f"{config_file} is missing or empty, and {path} is no Megatron checkpoint either")
    fields = official_fields(values, ignore_unknown=ignore_unknown)
    weights = open_weights(path)
    packing = values.get("quantization_config") or _quantize_config(path)
    if not packing:
        return _open_official(path, "official", fields, weights, values, ignore_unknown)
    unpacked = Weights(packed_tensors(weights.tensors, packing), weights.files)
    # What we write from here on is not packed.
    values = {key: value for key, value in values.items() if key != "quantization_config"}
    return _open_official(path, "gptq", fields, unpacked, values, ignore_unknown)


def read_config(path: Path | str) -> tuple[ModelConfig, Precision | None]:
    """What a directory's model is and how it is quantized; from config.json alone, whose weights need not be there.

    Megatron shards without a config.json are opened: they carry their sizes themselves. Raises what opening does.
    """
    path = model_folder(path)
    file = path / "config.json"
    if not file.is_file():
        return open_checkpoint(path).config, None
    values = read_json(file)
    with _named(path):
        if values.get("format") != FORMAT:
            return ModelConfig.from_dict(official_fields(values, ignore_unknown=True)), None
        precision = read_record(file, values["quantization"]) if "quantization" in values else None
        return read_native_config(file, values)[0], precision


def _quantize_config(path: Path) -> dict[str, Any]:
    file = path / "quantize_config.json"
    return read_json(file) if file.is_file() else {}


def _open_native(path: Path, values: Mapping[str, Any]) -> OpenCheckpoint:
    weights = open_weights(path)
    _check_counts(values.get("model"), weights.tensors)
    config, origin = read_native_config(path / "config.json", values)
    tensors, precision = weights.tensors, None
    if "quantization" in values:
        precision = read_record(path / "config.json", values["quantization"])
        tensors = packed_weights(path, packed_formats(config, precision), tensors, _dtype(values))
    check_tensors(path, layout(config).native, tensors)
    return OpenCheckpoint(
        path=path,
        format="native",
        config=config,
        tensors=tensors,
        stored=weights.tensors,
        origin=origin,
        files=weights.files,
        precision=precision,
    )


def _dtype(values: Mapping[str, Any]) -> torch.dtype:
    try:
        return parse_dtype(str(values.get("dtype")))
    except UsageError as error:
        raise ConfigError(str(error)) from error


def _open_official(
    path: Path,
    format: Format,
    fields: Mapping[str, Any],
    weights: Weights,
    original: Mapping[str, Any],
    ignore_unknown: bool,
) -> OpenCheckpoint:
    # Rotary frequencies, in old 2B files, follow from the configuration.
    stored = {name: tensor for name, tensor in weights.tensors.items() if not name.endswith(".rotary_emb.inv_freq")}
    _check_counts(fields, stored)
    # Whatever config.json says of tying: a head that is absent, or equal to the embedding, is the embedding (spec 1.1).
    head_equal = {EMBEDDING, HEAD} <= stored.keys() and _equal(stored[HEAD], stored[EMBEDDING], weights.files)
    tied = head_equal or HEAD not in stored
    config = ModelConfig.from_dict({**fields, "tie_word_embeddings": tied})
    table = layout(config)
    needed = {name: tensor for name, tensor in stored.items() if name in table.official}
    check_tensors(path, table.official, needed if ignore_unknown else stored, optional=HEAD)
    return OpenCheckpoint(
        path=path,
        format=format,
        config=config,
        tensors=to_native(table, needed),
        stored=needed,
        origin=Origin(config=original, head_stored=head_equal),
        files=weights.files,
    )


def _check_counts(fields: Any, stored: Mapping[str, LazyTensor]) -> None:
    """Refuse more layers, heads or experts than these files can hold, before a table of that size is made."""
    longest = max((size for tensor in stored.values() for size in tensor.shape), default=0)
    bounds = {"num_hidden_layers": len(stored), "num_attention_heads": longest, "num_experts": longest}
    for name, bound in bounds.items():
        value = fields.get(name, 0) if isinstance(fields, Mapping) else 0
        numbers = [number for number in (value if isinstance(value, list) else [value]) if isinstance(number, int)]
        if max(numbers, default=0) > bound:
            raise ConfigError(f"{name} is {value}; the weights beside it allow {bound} at most")


def _equal(a: LazyTensor, b: LazyTensor, files: Sequence[MappedBytes]) -> bool:
    """Whether two tensors are the same bit for bit; read block by block, and not at all where they share storage."""
    if isinstance(a, StoredTensor) and a == b:
        return True
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    for block_a, block_b in zip(a.blocks(), b.blocks(), strict=True):
        if not torch.equal(block_a.view(torch.uint8), block_b.view(torch.uint8)):
            return False
        for file in files:
            file.release()
    return True
