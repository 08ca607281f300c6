"""A dataset while it is written: files that only grow, and a journal of how far all of them are right.

The journal is renewed with every shard. A process that dies leaves files that are longer than the journal records; the
next one cuts them back and goes on, so that the finished files are those of a process that did not die.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from yuanmoe.data.prepare.chunks import Chunk, Place
from yuanmoe.data.prepare.formats import Encoded
from yuanmoe.data.sets.manifest import ENDS, SOURCES, DatasetManifest, mask_name, shard_name
from yuanmoe.errors import DataError
from yuanmoe.storage.whole_file import write_synced
from yuanmoe.text.tokenizer import Tokenizer

JOURNAL = "journal.json"
BLOCK_BYTES = 1 << 20


@dataclass(slots=True, kw_only=True)
class Journal:
    """What is on the disk."""

    fingerprint: str
    """Of sources, settings and tokenizer; only the same one goes on."""
    file: int = 0
    records: int = 0
    """With `file` the place after which to go on."""
    num_documents: int = 0
    num_tokens: int = 0
    text_bytes: int = 0
    trained_tokens: int = 0
    num_shards: int = 0
    source_files: int = 0
    source_bytes: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name: bytes, and the sha256 of files that grow no more."""


class DatasetWriter:
    """The files of an unfinished dataset; a context manager, which closes them."""

    def __init__(
        self, folder: Path, *, fingerprint: str, tokenizer: Tokenizer, masked: bool, shard_tokens: int
    ) -> None:
        """Takes up what an earlier process left in `folder` under the same fingerprint, else empties it."""
        self._folder, self._tokenizer, self._masked, self._shard_tokens = folder, tokenizer, masked, shard_tokens
        self.journal = _left_behind(folder, fingerprint) or Journal(fingerprint=fingerprint)
        self.resumed = self.journal.num_shards > 0
        if self.resumed:
            _cut_back(folder, self.journal)
        else:
            folder.mkdir(exist_ok=True)
            _clear(folder)
            tokenizer.save(folder)
        self._ends = (folder / ENDS).open("ab")
        self._sources = (folder / SOURCES).open("ab")
        self._shard: _Shard | None = None

    def __enter__(self) -> "DatasetWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._ends, self._sources, *(self._shard.files if self._shard else ())):
            file.close()

    @property
    def place(self) -> Place:
        """After which record to go on."""
        return Place(self.journal.file, self.journal.records)

    def append(self, chunk: Chunk, encoded: Encoded) -> None:
        """Add the documents of a chunk; the shard ends with it if it is full then. Raises OSError."""
        journal = self.journal
        if len(encoded.ids):
            self._check_ids(encoded)
            self._shard = self._shard or _Shard(self._folder, journal.num_shards, self._masked)
            self._shard.append(encoded)
            self._ends.write((journal.num_tokens + np.cumsum(encoded.lengths)).astype("<u8").tobytes())
        for source in chunk.finished:
            self._sources.write(json.dumps(source._asdict()).encode() + b"\n")  # ASCII: a name may be no UTF-8
        journal.file, journal.records = chunk.after
        journal.num_documents += len(encoded.lengths)
        journal.num_tokens += len(encoded.ids)
        journal.text_bytes += encoded.text_bytes
        journal.trained_tokens += int(encoded.mask.sum()) if encoded.mask is not None else 0
        journal.source_files += len(chunk.finished)
        journal.source_bytes += sum(source.bytes for source in chunk.finished)
        journal.skipped = dict(Counter(journal.skipped) + encoded.skipped)
        if self._shard and self._shard.num_tokens >= self._shard_tokens:
            self._finish_shard()

    def finish(self, settings: dict[str, Any], skipped: Counter[str]) -> None:
        """End the last shard and describe everything; the journal stays. DataError where there is not one document."""
        journal = self.journal
        left_out = skipped + Counter(journal.skipped)
        if not journal.num_documents:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items())) or "no records"
            raise DataError(f"no text in {journal.source_files} files ({reasons}); give files with text")
        if self._shard:
            self._finish_shard()
        for file in (self._ends, self._sources):
            _flush(file)
        grown = {name: _entry(self._folder / name) for name in (ENDS, SOURCES, self._tokenizer.file_name)}
        manifest = DatasetManifest(
            tokenizer_sha256=self._tokenizer.sha256,
            vocab_size=self._tokenizer.vocab_size,
            eod_id=self._tokenizer.eod_id,
            sep_id=self._tokenizer.sep_id,
            num_documents=journal.num_documents,
            num_tokens=journal.num_tokens,
            text_bytes=journal.text_bytes,
            trained_tokens=journal.trained_tokens if self._masked else None,
            num_shards=journal.num_shards,
            source_files=journal.source_files,
            source_bytes=journal.source_bytes,
            skipped=dict(sorted(left_out.items())),
            settings=settings,
            files={name: entry for name, entry in journal.files.items() if "sha256" in entry} | grown,
        )
        manifest.write(self._folder)

    def _check_ids(self, encoded: Encoded) -> None:
        largest = int(encoded.ids.max())
        if largest >= self._tokenizer.vocab_size:
            raise DataError(
                f"the tokenizer made the id {largest}, outside its vocabulary of {self._tokenizer.vocab_size}; its "
                "file is damaged, fetch it again"
            )

    def _finish_shard(self) -> None:
        """Put everything so far on the disk, then record it in the journal."""
        assert self._shard is not None, "a shard was begun"
        self.journal.files |= self._shard.close()
        self._shard = None
        self.journal.num_shards += 1
        for name, file in ((ENDS, self._ends), (SOURCES, self._sources)):
            _flush(file)
            self.journal.files[name] = {"bytes": file.tell()}
        write_synced(self._folder / JOURNAL, json.dumps(asdict(self.journal)) + "\n")


class _Shard:
    """The files of one shard, with their sums as they grow."""

    def __init__(self, folder: Path, number: int, masked: bool) -> None:
        names = [shard_name(number), *([mask_name(number)] if masked else [])]
        self.files = [(folder / name).open("wb") for name in names]
        self._names, self._digests = names, [hashlib.sha256() for _ in names]
        self.num_tokens = 0

    def append(self, encoded: Encoded) -> None:
        little_endian = encoded.ids.astype(encoded.ids.dtype.newbyteorder("<"), copy=False)
        columns = [little_endian, *([] if encoded.mask is None else [encoded.mask])]
        for file, digest, column in zip(self.files, self._digests, columns, strict=True):
            data = column.tobytes()
            file.write(data)
            digest.update(data)
        self.num_tokens += len(encoded.ids)

    def close(self) -> dict[str, dict[str, Any]]:
        """The entries of its files, which are on the disk."""
        entries = {}
        for name, file, digest in zip(self._names, self.files, self._digests, strict=True):
            _flush(file)
            entries[name] = {"bytes": file.tell(), "sha256": digest.hexdigest()}
            file.close()
        return entries


def _left_behind(folder: Path, fingerprint: str) -> Journal | None:
    """The journal of an earlier process, if it was at the same work and its files are there."""
    try:
        journal = Journal(**json.loads((folder / JOURNAL).read_text(encoding="utf-8")))
        whole = all((folder / name).stat().st_size >= entry["bytes"] for name, entry in journal.files.items())
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return journal if whole and journal.fingerprint == fingerprint else None


def _cut_back(folder: Path, journal: Journal) -> None:
    for name, entry in journal.files.items():
        os.truncate(folder / name, entry["bytes"])
    for path in folder.glob("shard-*"):
        if path.name not in journal.files:
            path.unlink()


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _entry(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
