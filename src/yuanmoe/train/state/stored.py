"""The tensors of a saved training state, read a range at a time from the pieces that ranks wrote.

One process writes `training.safetensors` with whole tensors. Of several, each writes what it alone holds as
`training-00001-of-00004.safetensors`: the elements of a flattened tensor from the offset that its key ends with,
`exp_avg.model.norm.weight@512`. Whoever reads wants ranges of its own, so that ranks may become more or fewer.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from yuanmoe.checkpoint.files.lazy import LazyTensor
from yuanmoe.checkpoint.files.safetensors_file import open_safetensors
from yuanmoe.errors import CheckpointError
from yuanmoe.storage.manifest import Manifest

TENSORS = "training.safetensors"


def state_key(name: str, start: int | None) -> str:
    """The key of a tensor, or of a piece of it from an element on."""
    return name if start is None else f"{name}@{start}"


def piece_name(rank: int, size: int) -> str:
    """The file of a rank."""
    return TENSORS if size == 1 else f"training-{rank + 1:05}-of-{size:05}.safetensors"


class Stored(Mapping[str, Tensor]):
    """The tensors in the pieces of a checkpoint, by name; an item is the whole tensor, flat where it was in pieces."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError for a folder in which a piece is missing."""
        self._path = path
        self._pieces: dict[str, dict[int, LazyTensor]] = {}
        for file in _files(path):
            for key, tensor in open_safetensors(file).tensors.items():
                name, _, start = key.partition("@")
                self._pieces.setdefault(name, {})[int(start or 0)] = tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, name: str) -> Tensor:
        pieces = self._pieces[name]
        if list(pieces) == [0]:
            return pieces[0].read().clone()
        return self.part(name, 0, sum(piece.numel for piece in pieces.values()))

    def part(self, name: str, start: int, length: int) -> Tensor:
        """So many elements of the flattened tensor, from `start` on, in memory of their own."""
        if name not in self._pieces:
            raise CheckpointError(f"{self._path} has no {name}, which its model needs to go on")
        found, at = [], start
        for first, piece in sorted(self._pieces[name].items()):
            if first <= at < first + piece.numel and at < start + length:
                stop = min(start + length, first + piece.numel)
                found.append(piece.read().flatten()[at - first : stop - first])
                at = stop
        if at < start + length:
            raise CheckpointError(f"{self._path} has no elements of {name} from {at} on; a piece of it is missing")
        return torch.cat(found) if found else torch.empty(0)


def check_whole(path: Path) -> None:
    """Raises CheckpointError where a file of a checkpoint is not what was written, by its size and sha256."""
    manifest = Manifest.read(path)
    for name, entry in sorted((manifest.shards if manifest else {}).items()):
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != entry["bytes"]:
            raise CheckpointError(f"{file} is damaged: it has {size or 0} bytes, {entry['bytes']} were written")
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != entry["sha256"]:
                raise CheckpointError(f"{file} is damaged: its sha256 is not that of what was written")


def _files(path: Path) -> list[Path]:
    if (path / TENSORS).is_file():
        return [path / TENSORS]
    found = sorted(path.glob("training-*-of-*.safetensors"))
    sizes = {int(file.stem.rpartition("-")[2]) for file in found}
    if len(sizes) != 1 or len(found) != max(sizes):
        there = ", ".join(file.name for file in found) or "none"
        raise CheckpointError(f"{path} has not all pieces of a training state: {there}; copy it again")
    return found
