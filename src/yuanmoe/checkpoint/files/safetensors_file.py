"""Read and write safetensors files a part at a time: the whole header is checked against the file before any tensor is
touched, and a file is written block by block, never held.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the tensors' bytes
without gaps. Source: the format's README (huggingface/safetensors). The official library cannot read a file that was
cut into pieces, nor write one that does not fit in memory.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from yuanmoe.checkpoint.files.lazy import LazyTensor, StoredTensor, Weights
from yuanmoe.checkpoint.files.mapped import MappedBytes
from yuanmoe.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_HEADER_BYTES = 100_000_000
"""The official library's limit; M32's longest header has 0.6 MB."""

DATA_ALIGNMENT = 64
"""Our headers are padded so that tensors start at a cache line, which the kernels' aligned loads want."""


def open_safetensors(*paths: Path) -> Weights:
    """One file, or the raw pieces of one in order. Raises CheckpointError unless every byte is accounted for."""
    data = MappedBytes(*paths)
    if data.size < 8:
        raise CheckpointError(f"{data} has {data.size} bytes, too few for a safetensors file; download it again")
    header_bytes = int.from_bytes(data.read(0, 8), "little")
    start = 8 + header_bytes
    if header_bytes > MAX_HEADER_BYTES:
        raise CheckpointError(f"{data} is no safetensors file: its first 8 bytes announce a header of {header_bytes}")
    if start > data.size:
        raise _truncated(data, start)
    tensors = {
        name: _tensor(data, start, name, entry)
        for name, entry in _header(data, start).items()
        if name != "__metadata__"
    }
    _check_extents(data, start, tensors)
    return Weights(dict(tensors), (data,))


def _header(data: MappedBytes, stop: int) -> dict[str, Any]:
    try:
        header = json.loads(data.read(8, stop))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{data} has a damaged header ({error}); download it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{data} has a damaged header (no JSON object); download it again")
    return header


def _tensor(data: MappedBytes, start: int, name: str, entry: Any) -> StoredTensor:
    damaged = CheckpointError(f"{data} describes tensor {name!r} as {entry!r:.200}; the header is damaged")
    try:
        dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = (*shape, first, last)
    except (TypeError, KeyError, ValueError):
        raise damaged from None
    if not isinstance(dtype, str) or any(type(number) is not int or number < 0 for number in numbers):
        raise damaged
    if dtype not in DTYPES:
        raise CheckpointError(f"{data}: tensor {name!r} has unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if last - first != nbytes:
        raise CheckpointError(
            f"{data}: tensor {name!r} {dtype} {shape} needs {nbytes} bytes, but its offsets {first}..{last} "
            f"hold {last - first}; the header is damaged"
        )
    return StoredTensor(shape=tuple(shape), dtype=DTYPES[dtype], data=data, offset=start + first)


def _check_extents(data: MappedBytes, start: int, tensors: Mapping[str, StoredTensor]) -> None:
    """Tensors must follow each other without gaps or overlaps to the last byte, as the format demands."""
    end = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=start)
    if end > data.size:
        raise _truncated(data, end)
    if end < data.size:
        raise CheckpointError(
            f"{data} has {data.size} bytes where its header describes {end}; it is not one whole file"
        )
    position = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != position:
            fault = "overlaps the one before" if tensor.offset < position else "leaves a gap before it"
            raise CheckpointError(f"{data}: tensor {name!r} {fault} (at {tensor.offset}, expected {position})")
        position += tensor.nbytes


def _truncated(data: MappedBytes, expected: int) -> CheckpointError:
    return CheckpointError(
        f"{data} is truncated: {expected} bytes expected, {data.size} there; "
        "a part is missing, or the download is incomplete"
    )


def write_safetensors(
    path: Path, tensors: Mapping[str, LazyTensor], on_bytes: Callable[[int], None] = lambda _: None
) -> str:
    """Write `tensors` in their order, block by block, and flush them to the disk; the file's sha256.

    `on_bytes` hears the size of every block after it is written. Raises OSError as the system does.
    """
    header = _new_header(tensors)
    digest = hashlib.sha256(header)
    with path.open("wb") as file:
        file.write(header)
        for tensor in tensors.values():
            for block in tensor.blocks():
                raw = block.contiguous().view(torch.uint8).numpy().data
                file.write(raw)
                digest.update(raw)
                on_bytes(len(raw))
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _new_header(tensors: Mapping[str, LazyTensor]) -> bytes:
    # "format": "pt" is what transformers asks of a file before it loads it.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        stop = start + tensor.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
