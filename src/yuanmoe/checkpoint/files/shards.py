"""The weight files of a Hugging Face directory, opened together: one file, shards with or without an index, pickles or
safetensors, and the byte pieces that the official GPTQ files were cut into.

Everything is checked before a weight is read: that every file is there and whole, and holds what the index says.
Not here: which tensors a model needs (`mapping.py`).
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from yuanmoe.checkpoint.files.lazy import LazyTensor, Weights
from yuanmoe.checkpoint.files.mapped import MappedBytes
from yuanmoe.checkpoint.files.pickle_file import open_pickle
from yuanmoe.checkpoint.files.safetensors_file import open_safetensors
from yuanmoe.errors import CheckpointError
from yuanmoe.storage.json_file import read_json

SAFETENSORS_INDEX = "model.safetensors.index.json"

# In the order that transformers looks for them.
_KNOWN = ("model.safetensors", SAFETENSORS_INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(safetensors|bin)")
_PIECE = re.compile(r"(.+\.safetensors)(\d{2,})")
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")


def open_weights(folder: Path) -> Weights:
    """The weights in `folder`. Raises CheckpointError naming what is missing, truncated or in the wrong file."""
    known = next((folder / name for name in _KNOWN if (folder / name).is_file()), None)
    if known and known.suffix == ".json":
        return _indexed(known)
    if known:
        return _open([known])
    return _together(map(_open, _unlisted(folder)))


def _open(paths: Sequence[Path]) -> Weights:
    return open_pickle(paths[0]) if paths[0].suffix == ".bin" else open_safetensors(*paths)


def _together(opened: Iterable[Weights]) -> Weights:
    tensors: dict[str, LazyTensor] = {}
    files: tuple[MappedBytes, ...] = ()
    for part in opened:
        tensors |= part.tensors
        files += part.files
    return Weights(tensors, files)


def _indexed(index: Path) -> Weights:
    """The shards that an index lists, where it says that each tensor is."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index} has no object 'weight_map' of file names; download it again")
    shards: dict[str, Weights] = {}
    for file in sorted(set(places.values())):
        held = [name for name in places if places[name] == file]
        if Path(file).name != file:
            raise CheckpointError(f"{index} places {held[0]!r} in {file!r}, outside its folder")
        if not (index.parent / file).is_file():
            raise CheckpointError(
                f"{index.parent / file} is missing; {index.name} places {len(held)} of {len(places)} tensors in it, "
                f"{held[0]!r} among them. Download it again"
            )
        shards[file] = _open([index.parent / file])
    weights = _together(shards.values())
    for name, file in places.items():
        if name not in shards[file].tensors:
            raise CheckpointError(
                f"tensor {name!r} is missing from {index.parent / file}, where {index.name} places it; "
                "the files belong to different checkpoints, or one is incomplete: download them again"
            )
        weights.tensors[name] = shards[file].tensors[name]
    return weights


def _unlisted(folder: Path) -> list[list[Path]]:
    """The weight files of a folder without index or known names: pieces of one, numbered shards, or a single file."""
    for suffix in (".safetensors", ".bin"):
        paths = sorted(path for path in folder.glob(f"*{suffix}*") if path.is_file() and path.name not in _NO_WEIGHTS)
        pieces = [path for path in paths if _PIECE.fullmatch(path.name)]
        shards = [path for path in paths if _SHARD.fullmatch(path.name) and path.suffix == suffix]
        singles = [path for path in paths if path.suffix == suffix and path not in shards]
        for found in (pieces, shards, singles):
            sets = _sets(found)
            if len(sets) > 1:
                raise CheckpointError(f"{folder} holds several weight files, {', '.join(sets)}; leave one in it")
            if sets:
                (paths,) = sets.values()
                return [paths] if found is pieces else [[path] for path in paths]
    raise CheckpointError(f"{folder} holds no weights: looked for {', '.join(_KNOWN)}, other *.safetensors and *.bin")


def _sets(paths: Sequence[Path]) -> dict[str, list[Path]]:
    """Files that belong together, by what they share in their names; each set checked to be complete."""
    sets: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        match = _PIECE.fullmatch(path.name) or _SHARD.fullmatch(path.name)
        sets[match[1] if match else path.name].append(path)
    for members in sets.values():
        _check_complete(members)
    return sets


def _check_complete(members: Sequence[Path]) -> None:
    piece, shard = _PIECE.fullmatch(members[0].name), _SHARD.fullmatch(members[0].name)
    if piece:
        # How many pieces there should be, only the header inside knows.
        expected = [f"{piece[1]}{number:0{len(piece[2])}}" for number in range(len(members))]
    elif shard:
        expected = [f"{shard[1]}-{number + 1:05}-of-{shard[3]}.{shard[4]}" for number in range(int(shard[3]))]
    else:
        return
    names = [path.name for path in members]
    for name in expected:
        if name not in names:
            raise CheckpointError(
                f"{members[0].parent / name} is missing, beside {', '.join(names)}; download it again"
            )
