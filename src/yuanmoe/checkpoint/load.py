"""Read a checkpoint into memory, or map it where it is what memory needs already.

A native checkpoint in its own dtype on the CPU is not copied: its tensors are private copy-on-write maps of the files.
Anything else is copied block by block, after it was checked that it fits.
Not here: formats (`store.py`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from yuanmoe.checkpoint.lazy import LazyTensor, cast
from yuanmoe.checkpoint.mapping import layout
from yuanmoe.checkpoint.native_config import dtype_name
from yuanmoe.checkpoint.store import Source, open_checkpoint
from yuanmoe.errors import ResourceError, UsageError
from yuanmoe.model.decoder import YuanForCausalLM
from yuanmoe.plan.machine import read_machine
from yuanmoe.plan.sizes import format_size


def load_model(
    path: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    ignore_unknown: bool = False,
    **changes: Any,
) -> YuanForCausalLM:
    """The model of a checkpoint of any format, ready for inference.

    `dtype` is the one that most weights are stored in unless one is named. `changes` are fields of ModelConfig that
    change what is computed, not the weights: `rope_theta`, `rope_angles`, `packing`. Raises what `open_checkpoint` and
    `load_state` raise, and UsageError for other changes.
    """
    source = open_checkpoint(path, ignore_unknown=ignore_unknown)
    config = source.config.replace(**changes)
    if layout(config) != layout(source.config):
        raise UsageError(f"{', '.join(changes)} cannot be changed while loading: the weights would not fit")
    with torch.device("meta"), _Undrawn():
        model = YuanForCausalLM(config)
    state = load_state(source, dtype=dtype or source.dtype, device=device)
    model.load_state_dict(state, assign=True)
    return model.eval()


class _Undrawn(TorchFunctionMode):
    """No normal numbers: to draw them on the meta device, torch first imports its reference library for 3 seconds."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **kwargs)


def load_state(
    source: Source, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """All weights under our names, in their own dtypes unless one is named.

    Raises ResourceError before anything is read when they do not fit, CheckpointError for weights beyond `dtype`.
    """
    device = torch.device(device)
    tensors = {name: cast(tensor, dtype, name) for name, tensor in source.tensors.items()}
    _check_memory(source, tensors, device)
    state = {}
    for name, tensor in tensors.items():
        state[name] = tensor.read(device)
        if not tensor.is_view:
            source.release()
    return state


def _check_memory(source: Source, tensors: Mapping[str, LazyTensor], device: torch.device) -> None:
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


def _free_memory(device: torch.device) -> int | None:
    """Bytes that can be had there; None where that is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return read_machine().available_bytes if device.type == "cpu" else None
