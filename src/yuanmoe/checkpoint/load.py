"""Read a checkpoint into memory, or map it where it is what memory needs already.

A native checkpoint in its own dtype on the CPU, quantized or not, is not copied: its tensors are private copy-on-write
maps of the files, whose memory processes share. Anything else is copied block by block, after it was checked that it
fits.
Not here: formats (`open.py`).
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Thread, main_thread
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from yuanmoe.checkpoint.files.lazy import LazyTensor, cast
from yuanmoe.checkpoint.files.mapped import MappedBytes
from yuanmoe.checkpoint.formats.mapping import layout
from yuanmoe.checkpoint.formats.native_config import dtype_name
from yuanmoe.checkpoint.formats.packed_weight import PackedWeight
from yuanmoe.checkpoint.open import OpenCheckpoint, open_checkpoint
from yuanmoe.errors import ResourceError, UsageError
from yuanmoe.model.decoder import CausalLM
from yuanmoe.model.quantized.build import quantized_model
from yuanmoe.ops.quantize.groupwise import BITS
from yuanmoe.plan import cost
from yuanmoe.plan.device.machine import read_machine
from yuanmoe.units import format_size

ASSUMED_RATE = 1e9
"""Bytes a second of a disk that could not be measured."""


def load_model(
    path: Path | str,
    *,
    dtype: torch.dtype | None = None,
    kv_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    ignore_unknown: bool = False,
    **changes: Any,
) -> CausalLM:
    """The model of a checkpoint of any format, ready for inference: `open_checkpoint`, then `model_of`."""
    source = open_checkpoint(path, ignore_unknown=ignore_unknown)
    return model_of(source, dtype=dtype, kv_dtype=kv_dtype, device=device, **changes)


def model_of(
    source: OpenCheckpoint,
    *,
    dtype: torch.dtype | None = None,
    kv_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    **changes: Any,
) -> CausalLM:
    """The model of an open checkpoint, ready for inference.

    `dtype` is the one that most weights are stored in unless one is named; that of the activations in a quantized
    model, whose default on a CPU is float32 (`docs/numerics.md`). `kv_dtype` is that of cached keys and values.
    `changes` are fields of ModelConfig that change what is computed, not the weights: `rope_theta`, `rope_angles`,
    `packing`. Raises what `load_state` raises, and UsageError for other changes.
    """
    config = source.config.replace(**changes)
    if layout(config) != layout(source.config):
        raise UsageError(f"{', '.join(changes)} cannot be changed while loading: the weights would not fit")
    formats = {name: tensor.format for name, tensor in source.tensors.items() if isinstance(tensor, PackedWeight)}
    if formats and dtype is None and torch.device(device).type == "cpu":
        dtype = torch.float32
    dtype = dtype or source.dtype
    with torch.device("meta"), _Undrawn():
        model = quantized_model(config, formats, dtype) if formats else CausalLM(config)
    model.load_state_dict(load_state(source, dtype=dtype, device=device), assign=True)
    model.kv_dtype = kv_dtype or model.kv_dtype
    return model.eval()


class _Undrawn(TorchFunctionMode):
    """No normal numbers: to draw them on the meta device, torch first imports its reference library for 3 seconds."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **kwargs)


def load_state(
    source: OpenCheckpoint, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """All weights under our names, in their own dtypes unless one is named; quantized ones as `codes` and `scales`.

    Raises ResourceError before anything is read when they do not fit, CheckpointError for weights beyond `dtype`.
    """
    device = torch.device(device)
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in source.tensors.items():
        if isinstance(tensor, PackedWeight):
            tensors |= {f"{name}.codes": tensor.codes, f"{name}.scales": tensor.scales}
        else:
            tensors[name] = tensor if _stays(source, tensor, dtype, device) else cast(tensor, dtype, name)
    _check_memory(source, tensors, device)
    state = {}
    for name, tensor in tensors.items():
        state[name] = tensor.read(device)
        if not tensor.is_view:
            source.release()
    if device.type == "cpu":
        _read_ahead(source, tensors)
    return state


def _stays(source: OpenCheckpoint, tensor: LazyTensor, dtype: torch.dtype | None, device: torch.device) -> bool:
    """Whether a whole matrix beside quantized ones is mapped as it is: products take bfloat16 under float32."""
    suits = (tensor.dtype, dtype, device.type) == (torch.bfloat16, torch.float32, "cpu")
    return source.precision is not None and suits and len(tensor.shape) > 1


def _read_ahead(source: OpenCheckpoint, tensors: Mapping[str, LazyTensor]) -> None:
    """Bring mapped weights into memory beside other work, or say what it costs that they do not fit."""
    mapped = sum(tensor.nbytes for tensor in tensors.values() if tensor.is_view)
    free = _free_memory(torch.device("cpu"))
    if free is None or mapped <= free:
        if mapped:
            # No daemon: one that is in torch while Python goes down aborts the process.
            Thread(target=_touch, args=(source.files,), name="weights ahead").start()
        return
    warnings.warn(_cost_of_disk(source, mapped, free), RuntimeWarning, stacklevel=3)


def _touch(files: Sequence[MappedBytes]) -> None:
    for file in files:
        file.touch(wanted=main_thread().is_alive)


def _cost_of_disk(source: OpenCheckpoint, mapped: int, free: int) -> str:
    """What it takes to run weights of which only a part fits into memory."""
    width = 1.0 if source.precision else source.dtype.itemsize / cost.STATE_BYTES
    read = width * cost.read_bytes(source.config, source.precision or cost.precision(16))
    from_disk = read * (1 - free / mapped)
    rate = max(source.files, key=lambda file: file.size).fault_rate()
    measured = f"{(rate or ASSUMED_RATE) / 1e9:.2f} GB/s {'measured now' if rate else 'assumed'}"
    few = source.precision is not None and min(source.precision.role_bits.values()) == min(BITS)
    ways = "more memory helps" if few else "more memory helps, or fewer bits: yuanmoe quantize"
    return (
        f"the weights of {source.path} take {format_size(mapped)}, {format_size(free)} of RAM are free: of the "
        f"{format_size(read)} that a token reads about {format_size(from_disk)} come from the disk, "
        f"{from_disk / (rate or ASSUMED_RATE):.2g} s a token at the {measured}; {ways}"
    )


def _check_memory(source: OpenCheckpoint, tensors: Mapping[str, LazyTensor], device: torch.device) -> None:
    on_cpu = device.type == "cpu"
    needed = sum(tensor.nbytes for tensor in tensors.values() if not (on_cpu and tensor.is_view))
    free = _free_memory(device)
    if free is None or needed <= free:
        return
    dtypes = ", ".join(sorted({dtype_name(tensor.dtype) for tensor in tensors.values()}))
    ways = ["a smaller dtype", "4-bit weights: yuanmoe quantize"]
    if on_cpu:
        ways.insert(0, f"the native layout, which is not copied in its own dtype: yuanmoe convert {source.path} NEW")
    raise ResourceError(
        f"{source.path} in {dtypes} needs {format_size(needed)} of {'RAM' if on_cpu else device}, "
        f"{format_size(free)} are free. Ways out: {'; '.join(ways)}"
    )


def usable_device(name: torch.device | str | None = None) -> torch.device:
    """The device of that name; by default a GPU where there is one. Raises UsageError for one that is not here."""
    gpus = torch.cuda.device_count()
    if name is None:
        return torch.device("cuda" if gpus else "cpu")
    known = ["cpu", *(f"cuda:{index}" for index in range(gpus))]
    if gpus:
        known.append("cuda")
    if str(name) not in known:
        why = "" if gpus or not str(name).startswith("cuda") else ": " + _no_gpu()
        raise UsageError(
            f"there is no device {str(name)!r} for torch {torch.__version__} here{why}; known: {', '.join(known)}"
        )
    return torch.device(name)


def _no_gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch was built for the CPU alone, install one with CUDA"
    return "it sees no GPU, `yuanmoe doctor` says more"


def _free_memory(device: torch.device) -> int | None:
    """Bytes that can be had there; None where that is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return read_machine().available_bytes if device.type == "cpu" else None
