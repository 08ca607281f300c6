"""Whether a checkpoint directory is whole: names and shapes against its config, and shards against their sha256.

Only what this package wrote has sums to compare with (`manifest.json`); of other directories the structure is checked.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from yuanmoe.checkpoint.files.lazy import BLOCK_BYTES
from yuanmoe.checkpoint.open import Format, open_checkpoint
from yuanmoe.checkpoint.write.writer import silent
from yuanmoe.errors import CheckpointError
from yuanmoe.storage.manifest import MANIFEST, Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What was found sound: every name, shape and dtype; `hashed_bytes` also against the sums taken when written."""

    path: Path
    format: Format
    tensors: int
    nbytes: int
    hashed_bytes: int


def verify_checkpoint(
    path: Path | str, *, ignore_unknown: bool = False, progress: Callable[[int, int], None] = silent
) -> Verified:
    """Check a checkpoint; `progress` hears bytes done and in all.

    Raises what `open_checkpoint` raises, and CheckpointError for a shard that is not what was written.
    """
    path = Path(path)
    source = open_checkpoint(path, ignore_unknown=ignore_unknown)
    manifest = Manifest.read(path) or Manifest(fingerprint="")
    total = sum(entry["bytes"] for entry in manifest.shards.values())
    done = 0
    for name, entry in manifest.shards.items():
        found = hashlib.sha256()
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing, though {MANIFEST} lists it; copy it again")
        with (path / name).open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                found.update(block)
                done += len(block)
                progress(done, total)
        if found.hexdigest() != entry["sha256"]:
            raise CheckpointError(
                f"{path / name} is damaged: its sha256 is {found.hexdigest()}, {MANIFEST} says {entry['sha256']}; "
                "copy it again, or convert again"
            )
    nbytes = sum(tensor.nbytes for tensor in source.stored.values())
    return Verified(path=path, format=source.format, tensors=len(source.tensors), nbytes=nbytes, hashed_bytes=done)
