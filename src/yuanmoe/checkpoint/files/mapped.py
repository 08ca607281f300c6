"""The bytes of files as tensors, without reading them: a private memory map over one file, or over the consecutive
pieces of one (the official GPTQ releases cut one file at arbitrary bytes).

Maps are copy-on-write: a tensor of theirs may be written to, and the file never changes.
Not here: what the bytes mean (`safetensors_file.py`, `pickle_file.py`).
"""

import mmap
import os
import sys
import time
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from yuanmoe.errors import CheckpointError

# Linux counts a private writable map against RAM as a whole unless told not to reserve: an 80 GB file would be refused.
# Python 3.11 does not name the flag.
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0

_PAGES_AT_ONCE = 1 << 10
"""Touched before `touch` looks whether it is still wanted: 4 MiB, 0.4 s of the slowest disk."""

_SAMPLE_BYTES = 64 << 20
"""Read to measure a disk: two experts' matrices of M32 in 4 bits, half a second of a slow one."""


class MappedBytes:
    """One file, or several that are one when joined, as an addressable range of `size` bytes."""

    def __init__(self, *paths: Path) -> None:
        self.paths: tuple[Path, ...] = paths
        self._maps = [_map(path) for path in paths]
        self._ends = list(accumulate(len(piece) for piece in self._maps))
        self.size = self._ends[-1]

    def __str__(self) -> str:
        first, last = self.paths[0], self.paths[-1]
        return str(first) if first == last else f"{first} .. {last.name}"

    def read(self, start: int, stop: int) -> bytes:
        """A copy of the bytes [start, stop); short where the file ends."""
        parts = []
        for piece, end in zip(self._maps, self._ends, strict=True):
            base = end - len(piece)
            parts.append(piece[max(start - base, 0) : max(stop - base, 0)])
        return b"".join(parts)

    def is_view(self, start: int, dtype: torch.dtype, count: int) -> bool:
        """Whether `tensor` gives a view of the map: within one piece, and aligned."""
        piece, first = self._locate(start)
        return first % dtype.itemsize == 0 and first + count * dtype.itemsize <= len(piece)

    def tensor(self, start: int, dtype: torch.dtype, count: int) -> Tensor:
        """`count` elements from byte `start` on, 1-D: a view of the map, or a copy where `is_view` says no."""
        stop = start + count * dtype.itemsize
        assert 0 <= start <= stop <= self.size, f"bytes {start}..{stop} of {self.size} in {self}"
        if count == 0:
            return torch.empty(0, dtype=dtype)
        if not self.is_view(start, dtype, count):
            return torch.frombuffer(bytearray(self.read(start, stop)), dtype=dtype)
        piece, first = self._locate(start)
        return torch.frombuffer(piece, dtype=dtype, count=count, offset=first)

    def _locate(self, start: int) -> tuple[mmap.mmap, int]:
        """The piece with byte `start`, and where in it that is; an empty tensor may start at the very end."""
        index = min(bisect_right(self._ends, start), len(self._maps) - 1)
        piece = self._maps[index]
        return piece, start - (self._ends[index] - len(piece))

    def touch(self, wanted: Callable[[], bool]) -> None:
        """Read a byte of every page: what is not cached is read ahead, what is cached is mapped before it is needed.

        Takes as long as the disk does, without Python's lock, or until it is no longer `wanted`; only where the files
        fit into memory.
        """
        for piece in self._maps:
            pages = torch.frombuffer(piece, dtype=torch.uint8)[:: mmap.PAGESIZE]
            for some in pages.split(_PAGES_AT_ONCE):
                if not wanted():
                    return
                some.sum()

    def fault_rate(self) -> float | None:
        """Bytes a second at which pages that are not in memory come, measured now; None where none can be sent away."""
        if not hasattr(os, "posix_fadvise"):
            return None
        piece, path = max(zip(self._maps, self.paths, strict=True), key=lambda pair: len(pair[0]))
        size = min(len(piece), _SAMPLE_BYTES)
        first = (len(piece) - size) // 2 // mmap.PAGESIZE * mmap.PAGESIZE
        piece.madvise(mmap.MADV_DONTNEED)
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), first, size, os.POSIX_FADV_DONTNEED)
        pages = torch.frombuffer(piece, dtype=torch.uint8, count=size, offset=first)[:: mmap.PAGESIZE]
        start = time.perf_counter()
        pages.sum()
        return size / (time.perf_counter() - start)

    def release(self) -> None:
        """Let go of the pages read so far, so that streaming through a file does not fill memory.

        What was written to tensors of this map is forgotten; only for readers.
        """
        if hasattr(mmap, "MADV_DONTNEED"):
            for piece in self._maps:
                piece.madvise(mmap.MADV_DONTNEED)


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise CheckpointError(f"{path} is empty (0 bytes); copy or download it again")
            flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
            return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as error:
        raise CheckpointError(f"cannot open {path}: {error.strerror}") from error
