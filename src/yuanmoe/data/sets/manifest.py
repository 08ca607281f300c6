"""`manifest.json` of a dataset: what its tokens came from, how many they are, and the checksum of every file.

The same sources, tokenizer and settings give the same manifest, byte for byte: no times, no machine, no workers.
Not here: the files themselves (`packed.py` reads, `output.py` writes).
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_origin

from yuanmoe.errors import DataError
from yuanmoe.storage.whole_file import write_synced
from yuanmoe.text.tokenizer import Tokenizer

MANIFEST = "manifest.json"
ENDS = "documents.idx"
"""Where each document ends, in tokens of the whole dataset: unsigned little-endian integers of eight bytes."""
SOURCES = "sources.jsonl"
"""One line a source file: path, bytes, sha256."""

_FORMAT = {"format": "yuanmoe-tokens", "version": 1}


def shard_name(number: int) -> str:
    """Ids, little-endian: two bytes each, or four where the vocabulary has more than 65,536."""
    return f"shard-{number:05}.bin"


def mask_name(number: int) -> str:
    """One byte for each token of the shard: 1 where it is to be learned, 0 where it is only read."""
    return f"shard-{number:05}.mask"


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetManifest:
    """What `manifest.json` says."""

    tokenizer_sha256: str
    vocab_size: int
    """Of the tokenizer: every id is below it."""
    eod_id: int
    """The last token of every document."""
    sep_id: int
    num_documents: int
    num_tokens: int
    """The `<eod>` of every document included."""
    text_bytes: int
    """Of the documents as UTF-8; a loss in bits is divided by them."""
    trained_tokens: int | None
    """Those to be learned; None where there is no mask and all of them are."""
    num_shards: int
    source_files: int
    source_bytes: int
    skipped: dict[str, int] = field(default_factory=dict)
    """Reason: how many files or records were left out for it."""
    settings: dict[str, Any] = field(default_factory=dict)
    """How the sources were read."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name: `{"bytes": .., "sha256": ..}`."""

    @property
    def bytes_per_token(self) -> float:
        return self.text_bytes / self.num_tokens

    @property
    def id_bytes(self) -> int:
        """Bytes of an id in the shards."""
        return 2 if self.vocab_size <= 2**16 else 4

    @property
    def sha256(self) -> str:
        """Of the manifest, and so of everything that it has the checksum of."""
        return hashlib.sha256(self._text().encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Put it on the disk, whole or not at all."""
        write_synced(folder / MANIFEST, self._text())

    @classmethod
    def read(cls, folder: Path) -> "DatasetManifest":
        """The manifest in a folder. Raises DataError where there is none, or a damaged one."""
        path = folder / MANIFEST
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            form = {key: values.pop(key) for key in _FORMAT}
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(
                f"{path} is missing, so there are no finished tokens; make them with yuanmoe data pack"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} does not describe tokens ({error}); pack them again") from error
        if form != _FORMAT:
            raise DataError(f"{path} is of {form}, this version reads {_FORMAT}; pack the tokens again")
        return cls._checked(path, values)

    @classmethod
    def _checked(cls, path: Path, values: dict[str, Any]) -> "DatasetManifest":
        kinds = {each.name: each.type for each in dataclasses.fields(cls)}
        same = kinds.keys() & values.keys()
        if wrong := (kinds.keys() ^ values.keys()) | {name for name in same if not _fits(kinds[name], values[name])}:
            raise DataError(f"{path} does not describe tokens (see {', '.join(sorted(wrong))}); pack them again")
        return cls(**values)

    def _text(self) -> str:
        return json.dumps(_FORMAT | dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"


def check_same_tokenizer(manifest: DatasetManifest, tokenizer: Tokenizer, name: str) -> None:
    """Raise DataError unless the tokens of dataset `name` were made by this tokenizer."""
    if manifest.tokenizer_sha256 == tokenizer.sha256:
        return
    raise DataError(
        f"{name} was packed with another tokenizer: sha256 {manifest.tokenizer_sha256[:12]} with {manifest.vocab_size} "
        f"ids, this one is {tokenizer.sha256[:12]} with {tokenizer.vocab_size}; pack the text again with this one"
    )


def _fits(kind: Any, value: Any) -> bool:
    if kind in (int, int | None):
        return (type(value) is int and value >= 0) or (value is None and kind is not int)
    return isinstance(value, get_origin(kind) or kind)
