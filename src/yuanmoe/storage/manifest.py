"""What was written into a checkpoint directory: the size and sha256 of every finished shard.

While a directory is being written this is its journal: a listed shard is on the disk, and a run with the same
fingerprint need not write it again. Afterwards `verify.py` compares the files with it.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from yuanmoe.errors import CheckpointError
from yuanmoe.storage.json_file import json_text, read_json
from yuanmoe.storage.whole_file import write_synced

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Finished shards by file name, each `{"bytes": .., "sha256": ..}`, of what `fingerprint` stands for."""

    fingerprint: str
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """The manifest in a folder; None where there is none. Raises CheckpointError for a damaged one."""
        if not (folder / MANIFEST).is_file():
            return None
        values = read_json(folder / MANIFEST)
        shards = values.get("shards")
        if not isinstance(shards, dict) or not all(map(_sound, shards.values())):
            raise CheckpointError(f"{folder / MANIFEST} is damaged; remove it to go on without it")
        return cls(fingerprint=str(values.get("fingerprint")), shards=shards)

    def write(self, folder: Path) -> None:
        """Put it on the disk, whole or not at all."""
        write_synced(folder / MANIFEST, json_text({"fingerprint": self.fingerprint, "shards": self.shards}))


def _sound(entry: Any) -> bool:
    return isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)
