"""Tensors that are known by shape and dtype and read a part at a time, so that memory stays bounded.

The unit is a range [start, stop) of the flattened, row-major tensor, in whole rows.
Not here: where tensors come from (`mapped.py`, `gptq.py`, `megatron.py`) and what they are called (`mapping.py`).
"""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from yuanmoe.checkpoint.files.mapped import MappedBytes
from yuanmoe.errors import CheckpointError

BLOCK_BYTES = 64 << 20
"""Largest part read at once where nothing asks for more: one expert's matrix of M32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LazyTensor(ABC):
    """A tensor somewhere; nothing of it is read until a method asks."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def row(self) -> int:
        """Elements that are read together: a matrix row, all inputs and taps of a convolution's output."""
        return math.prod(self.shape[1:] if len(self.shape) == 4 else self.shape[-1:])

    @property
    def is_view(self) -> bool:
        """Whether the whole is mapped memory already, so that reading it copies nothing."""
        return False

    @abstractmethod
    def flat(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor, 1-D, a view where possible; multiples of `row`."""

    def blocks(self, max_bytes: int = BLOCK_BYTES) -> Iterator[Tensor]:
        """The whole in order as 1-D blocks of at most `max_bytes`, but at least one row."""
        yield from blocks_between(self, 0, self.numel, max_bytes)

    def rows(self, start: int, stop: int) -> Tensor:
        """`tensor[start:stop]` along the first dimension, such as some experts of a stack."""
        size = math.prod(self.shape[1:])
        return self.flat(start * size, stop * size).view(stop - start, *self.shape[1:])

    def read(self, device: torch.device | str = "cpu") -> Tensor:
        """The whole: mapped memory as it is where `is_view` holds on the CPU, else a copy made block by block."""
        if self.is_view and torch.device(device).type == "cpu":
            return self.flat(0, self.numel).view(self.shape)
        whole = torch.empty(self.numel, dtype=self.dtype, device=device)
        start = 0
        for block in self.blocks():
            whole[start : start + len(block)].copy_(block)
            start += len(block)
        return whole.view(self.shape)


def blocks_between(tensor: LazyTensor, start: int, stop: int, max_bytes: int) -> Iterator[Tensor]:
    """Elements [start, stop) of `tensor` in whole rows, as blocks of at most `max_bytes`, but at least one row."""
    row = tensor.row
    step = max(1, max_bytes // max(1, row * tensor.dtype.itemsize)) * max(1, row)
    for first in range(start, stop, step):
        yield tensor.flat(first, min(first + step, stop))


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor(LazyTensor):
    """A contiguous tensor at byte `offset` of a file."""

    data: MappedBytes
    offset: int

    @property
    def is_view(self) -> bool:
        return self.data.is_view(self.offset, self.dtype, self.numel)

    def flat(self, start: int, stop: int) -> Tensor:
        return self.data.tensor(self.offset + start * self.dtype.itemsize, self.dtype, stop - start)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorView(LazyTensor):
    """A tensor in memory, or a strided one in a map."""

    tensor: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorView":
        """`tensor` as a lazy one, on the CPU only when read."""
        return cls(shape=tuple(tensor.shape), dtype=tensor.dtype, tensor=tensor.detach())

    @property
    def is_view(self) -> bool:
        return self.tensor.is_contiguous() and self.tensor.device.type == "cpu"

    def flat(self, start: int, stop: int) -> Tensor:
        # Only the rows asked for become contiguous.
        size = math.prod(self.shape[1:])
        first = start // size
        rows = self.tensor[first : -(-stop // size)].cpu().reshape(-1)
        return rows[start - first * size : stop - first * size]


class TensorPart(NamedTuple):
    """Elements [start, stop) of a flattened tensor."""

    tensor: LazyTensor
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ComposedTensor(LazyTensor):
    """Parts of other tensors, one after the other; each row optionally transposed from `taps` (a, b) to (b, a)."""

    parts: tuple[TensorPart, ...]
    taps: tuple[int, int] | None = None

    @classmethod
    def of(
        cls, shape: tuple[int, ...], parts: list[TensorPart], taps: tuple[int, int] | None = None
    ) -> "ComposedTensor":
        """`parts` joined to `shape`. Different dtypes meet in the smallest that holds both without loss."""
        dtype = parts[0].tensor.dtype
        for part in parts[1:]:
            dtype = torch.promote_types(dtype, part.tensor.dtype)
        assert sum(part.stop - part.start for part in parts) == math.prod(shape), f"parts do not fill {shape}"
        return cls(shape=shape, dtype=dtype, parts=tuple(parts), taps=taps)

    @property
    def is_view(self) -> bool:
        whole = len(self.parts) == 1 and self.taps is None
        return whole and self.parts[0].tensor.is_view

    def flat(self, start: int, stop: int) -> Tensor:
        found = []
        base = 0
        for tensor, first, last in self.parts:
            low, high = max(start - base, 0), min(stop - base, last - first)
            if low < high:
                found.append(tensor.flat(first + low, first + high))
            base += last - first
        return self._finish(found[0] if len(found) == 1 else torch.cat(found))

    def blocks(self, max_bytes: int = BLOCK_BYTES) -> Iterator[Tensor]:
        # Part by part: no block needs joining, so none is copied for it.
        for tensor, first, last in self.parts:
            for block in blocks_between(tensor, first, last, max_bytes):
                yield self._finish(block)

    def _finish(self, flat: Tensor) -> Tensor:
        if self.taps is not None:
            flat = flat.view(-1, *self.taps).transpose(1, 2).reshape(-1)
        return flat.to(self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class CastTensor(LazyTensor):
    """Another dtype of a tensor; numbers that leave its range are an error, not infinities."""

    tensor: LazyTensor
    name: str

    def flat(self, start: int, stop: int) -> Tensor:
        return self._cast(self.tensor.flat(start, stop))

    def blocks(self, max_bytes: int = BLOCK_BYTES) -> Iterator[Tensor]:
        yield from map(self._cast, self.tensor.blocks(max_bytes))

    def _cast(self, block: Tensor) -> Tensor:
        cast, limit = block.to(self.dtype), torch.finfo(self.dtype).max
        narrower = limit < torch.finfo(block.dtype).max
        if narrower and bool(torch.isinf(cast).any()) and not bool(torch.isinf(block).any()):
            raise CheckpointError(
                f"{self.name} reaches {block.abs().max().item():.4g}, beyond the {limit:.4g} that {self.dtype} holds; "
                "use bfloat16 or float32"
            )
        return cast


def cast(tensor: LazyTensor, dtype: torch.dtype | None, name: str) -> LazyTensor:
    """`tensor` in `dtype`; as it is where it has it already, or where `dtype` is None."""
    if dtype is None or dtype == tensor.dtype:
        return tensor
    return CastTensor(shape=tensor.shape, dtype=dtype, tensor=tensor, name=name)


def main_dtype(tensors: Mapping[str, LazyTensor]) -> torch.dtype:
    """The dtype of most of the numbers."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype] += tensor.numel
    return sizes.most_common(1)[0][0]


class Weights(NamedTuple):
    """The tensors of one or more files by name, and the files."""

    tensors: dict[str, LazyTensor]
    files: tuple[MappedBytes, ...]
