"""A dataset: documents as token ids in memory-mapped shards, with where each ends and which tokens to learn.

The files are listed in `manifest.py`. Nothing is read before it is touched. A whole dataset is also a row of tokens:
`len(tokens)`, `tokens[start:stop]`. Not here: other formats (`megatron.py`), the order in which to learn (`loader.py`).
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yuanmoe.data.permutation import Integers
from yuanmoe.data.sets.manifest import ENDS, MANIFEST, DatasetManifest, mask_name, shard_name
from yuanmoe.errors import DataError


class PackedTokens:
    """The dataset in a folder; a `Documents`. Threads and processes may share the files."""

    def __init__(self, path: str | Path) -> None:
        """Raises DataError when a file is missing or has not the size that the manifest says."""
        self.path = Path(path)
        self.name = str(path)
        self.manifest = DatasetManifest.read(self.path)
        self.num_documents, self.num_tokens = self.manifest.num_documents, self.manifest.num_tokens
        self.vocab_size: int | None = self.manifest.vocab_size
        self._check_sizes()
        self._ends = np.memmap(self.path / ENDS, dtype="<u8", mode="r")
        numbers = range(self.manifest.num_shards)
        sizes = [self.manifest.files[shard_name(number)]["bytes"] for number in numbers]
        self._stops = np.cumsum(sizes, dtype=np.int64) // self.manifest.id_bytes
        # Thousands of shards need not be open before one is read.
        self._ids = cache(lambda number: np.memmap(self.path / shard_name(number), dtype=self._dtype, mode="r"))
        self._masks = cache(lambda number: np.memmap(self.path / mask_name(number), dtype=np.bool_, mode="r"))

    @property
    def fingerprint(self) -> str:
        """Of everything that the manifest has the checksum of."""
        return self.manifest.sha256

    @property
    def _dtype(self) -> str:
        return f"<u{self.manifest.id_bytes}"

    def __len__(self) -> int:
        return self.num_tokens

    def __getitem__(self, place: slice) -> Integers:
        """Tokens of the whole row, across documents and shards; steps other than 1 are not for it."""
        start, stop, step = place.indices(self.num_tokens)
        assert step == 1, step
        return self._row(self._ids, start, stop).astype(np.int64)

    def lengths(self, documents: Integers) -> Integers:
        """Tokens of each of `documents`, the `<eod>` included."""
        return (self._ends[documents] - self._starts(documents)).astype(np.int64)

    def read(self, document: int, start: int, stop: int) -> Integers:
        """Tokens `start` to `stop` of one document."""
        first = int(self._starts(np.array([document]))[0])
        return self[first + start : first + stop]

    def mask(self, document: int, start: int, stop: int) -> npt.NDArray[np.bool_] | None:
        """Which of them are to be learned; None where the dataset has no mask."""
        if self.manifest.trained_tokens is None:
            return None
        first = int(self._starts(np.array([document]))[0])
        return self._row(self._masks, first + start, first + stop)

    def _starts(self, documents: Integers) -> npt.NDArray[np.uint64]:
        return np.where(documents > 0, self._ends[documents - 1], np.uint64(0))

    def _row(self, shards: Callable[[int], npt.NDArray[Any]], start: int, stop: int) -> npt.NDArray[Any]:
        """From `start` to `stop` through the shards, each of which `shards` maps."""
        first, last = np.searchsorted(self._stops, [start, max(start, stop - 1)], side="right")
        parts = []
        for number in range(int(first), min(int(last), len(self._stops) - 1) + 1):
            begin = int(self._stops[number - 1]) if number else 0
            parts.append(shards(number)[max(start - begin, 0) : max(stop - begin, 0)])
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _check_sizes(self) -> None:
        wanted = self.manifest.files
        names = [*map(shard_name, range(self.manifest.num_shards)), ENDS]
        names += [] if self.manifest.trained_tokens is None else map(mask_name, range(self.manifest.num_shards))
        for name in names:
            if type(wanted.get(name, {}).get("bytes")) is not int:
                raise DataError(f"{self.path / MANIFEST} does not list {name}; pack the tokens again")
        for name, entry in wanted.items():
            size = (self.path / name).stat().st_size if (self.path / name).is_file() else 0
            if size != entry["bytes"]:
                raise DataError(
                    f"{self.path / name} has {size} bytes where {entry['bytes']} were written; it is damaged: fetch it "
                    "again, or pack the tokens again"
                )
        tokens = sum(wanted[name]["bytes"] for name in names if name.endswith(".bin")) // self.manifest.id_bytes
        if (tokens, wanted[ENDS]["bytes"]) != (self.num_tokens, 8 * self.num_documents):
            raise DataError(
                f"{self.path / MANIFEST} speaks of {self.num_tokens} tokens in {self.num_documents} documents, the "
                f"files hold {tokens} in {wanted[ENDS]['bytes'] // 8}; pack the tokens again"
            )
