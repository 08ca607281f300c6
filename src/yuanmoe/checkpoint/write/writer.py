"""Write a checkpoint directory shard by shard, so that memory stays bounded and an interrupted run goes on.

The directory holds config.json, safetensors shards with an index where there are several, `manifest.json`, and copies
of the small files that came with the source. Not here: names and configurations of a layout (`save.py`).
"""

import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from yuanmoe.checkpoint.files.lazy import LazyTensor
from yuanmoe.checkpoint.files.safetensors_file import write_safetensors
from yuanmoe.checkpoint.files.shards import SAFETENSORS_INDEX
from yuanmoe.storage.folder import check_free_disk, copy_synced, new_folder
from yuanmoe.storage.json_file import json_text
from yuanmoe.storage.manifest import MANIFEST, Manifest
from yuanmoe.storage.whole_file import write_synced

SHARD_BYTES = 5_000_000_000
"""A shard holds at most this, or one tensor. One layer of M32 has 3.3 GB."""

_LOG = logging.getLogger(__name__)

_SMALL_FILES_BYTES = 16 << 20
"""Room for config.json, the index, the manifest and headers; M32's have 1 MB."""


Facts = Callable[[Iterable[str]], Mapping[str, Any]]
"""What is worth remembering of tensors that were just written, by name."""

Extras = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""More JSON files by name, out of the facts of all tensors."""


def silent(*_: object) -> None:
    """Hears, and does nothing."""


def nothing(_: object) -> Mapping[str, Any]:
    """No facts, no files."""
    return {}


class WriteOptions(TypedDict, total=False):
    """How to write; every one may be left out."""

    shard_bytes: int
    """Bytes of tensors in one file, `SHARD_BYTES` by default; a larger tensor has a file of its own."""
    overwrite: bool
    """Replace a checkpoint that has the name, once the new one is complete."""
    progress: Callable[[int, int], None]
    """Hears bytes of tensors done and in all, after every block."""
    say: Callable[[str], None]
    """Hears that a run resumes or starts over; the log by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a checkpoint directory is to hold."""

    tensors: Mapping[str, LazyTensor]
    config: Mapping[str, Any]
    copies: Sequence[Path] = ()
    fingerprint: str = ""
    """Of where the tensors come from; only the same one resumes, and without one nothing does."""
    release: Callable[[], None] = silent
    """Gives back the memory of what was read; called after every block."""
    facts: Facts = nothing
    """Asked after each shard; the manifest keeps them with it."""
    extras: Extras = nothing
    """Asked when all shards are written."""
    beside: Mapping[str, Mapping[str, LazyTensor]] = field(default_factory=dict)
    """More safetensors files by name, which are no part of the model."""
    moved: Mapping[Path, Mapping[str, Any]] = field(default_factory=dict)
    """Files on the same disk, finished and flushed, that move in, each with its entry of the manifest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What was written: bytes of tensors in all, and how many shards of how many were there from an earlier run."""

    path: Path
    tensors: int
    nbytes: int
    shards: int
    resumed_shards: int
    facts: Mapping[str, Any]
    """Of all tensors, those of earlier runs included."""


def write_checkpoint(
    dst: Path | str,
    contents: Contents,
    *,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = silent,
    say: Callable[[str], None] = _LOG.warning,
) -> Written:
    """Write `contents` beside `dst`, flush it to the disk, and rename it.

    Raises what `folder.new_folder` raises, and ResourceError before anything is written when the disk is too small.
    """
    dst = Path(dst).absolute()
    shards = _plan(contents.tensors, shard_bytes)
    files = {**shards, **contents.beside}
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    with new_folder(dst, overwrite=overwrite) as folder:
        manifest = _begin(folder, contents, files, say)
        resumed = len(manifest.shards)
        missing = {name: tensors for name, tensors in files.items() if name not in manifest.shards}
        done = total - sum(tensor.nbytes for tensors in missing.values() for tensor in tensors.values())
        copies_bytes = sum(path.stat().st_size for path in contents.copies)
        check_free_disk(folder, total - done + copies_bytes + _SMALL_FILES_BYTES)

        def written(size: int) -> None:
            nonlocal done
            done += size
            contents.release()
            progress(done, total)

        for name, tensors in missing.items():
            digest = write_safetensors(folder / name, tensors, on_bytes=written)
            entry: dict[str, Any] = {"bytes": (folder / name).stat().st_size, "sha256": digest}
            learned = contents.facts(tensors)
            manifest.shards[name] = entry | {"facts": learned} if learned else entry
            manifest.write(folder)
        facts = {name: fact for entry in manifest.shards.values() for name, fact in entry.get("facts", {}).items()}
        _write_small_files(folder, contents, shards)
        for name, values in contents.extras(facts).items():
            write_synced(folder / name, json_text(values))
        for path, moved in contents.moved.items():
            path.replace(folder / path.name)
            manifest.shards[path.name] = dict(moved)
        # Without the fingerprint nothing resumes from it: should a process be killed while it exchanges the finished
        # folder for an older one, the next one finds the older one in its place.
        Manifest(fingerprint="", shards=manifest.shards).write(folder)
    return Written(
        path=dst,
        tensors=len(contents.tensors),
        nbytes=total,
        shards=len(shards),
        resumed_shards=resumed,
        facts=facts,
    )


def _plan(tensors: Mapping[str, LazyTensor], shard_bytes: int) -> dict[str, dict[str, LazyTensor]]:
    """The tensors of each shard by file name: in order, as many as fit."""
    groups: list[dict[str, LazyTensor]] = []
    room = -1
    for name, tensor in tensors.items():
        if tensor.nbytes > room:
            groups.append({})
            room = shard_bytes
        groups[-1][name] = tensor
        room -= tensor.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{at:05}-of-{len(groups):05}.safetensors": group for at, group in enumerate(groups, 1)}


def _begin(
    folder: Path, contents: Contents, shards: Mapping[str, Mapping[str, LazyTensor]], say: Callable[[str], None]
) -> Manifest:
    """The manifest to go on with: an earlier run's of the same contents, or an empty one in an empty folder."""
    manifest = Manifest(fingerprint=_fingerprint(contents, shards))
    found = Manifest.read(folder)
    if found is not None and found.fingerprint == manifest.fingerprint:
        whole = {name: entry for name, entry in found.shards.items() if _size(folder / name) == entry["bytes"]}
        manifest.shards.update(whole)
        say(f"resuming {folder}: {len(whole)} of {len(shards)} shards are there")
    elif found is not None:
        say(f"starting over: what is in {folder} is not of this source and these options")
    for path in folder.iterdir():
        if path.name not in (*manifest.shards, MANIFEST):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    manifest.write(folder)
    return manifest


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _fingerprint(contents: Contents, shards: Mapping[str, Mapping[str, LazyTensor]]) -> str:
    """Of the source and of all that is to be written; a new one each time where the source has none."""
    plan = {
        shard: [(name, str(tensor.dtype), tensor.shape) for name, tensor in tensors.items()]
        for shard, tensors in shards.items()
    }
    facts = [contents.fingerprint or uuid.uuid4().hex, contents.config, plan]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _write_small_files(folder: Path, contents: Contents, shards: Mapping[str, Mapping[str, LazyTensor]]) -> None:
    if len(shards) > 1:
        places = {name: shard for shard, tensors in shards.items() for name in tensors}
        total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_synced(folder / SAFETENSORS_INDEX, json_text(index))
    for path in contents.copies:
        copy_synced(path, folder)
    write_synced(folder / "config.json", json_text(contents.config))
