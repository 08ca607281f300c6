"""Megatron's pairs of files, `NAME.bin` and `NAME.idx`, as the official training reads and writes them.

Sources: Megatron-LM's indexed dataset, and IEIT-Yuan/Yuan2.0-M32 (tools/preprocess_data_yuan.py writes int32 and one
document a sequence; megatron/data/gpt_dataset.py takes every sequence for a document and ignores the document index).

| bytes of NAME.idx | what |
|---|---|
| 9, 8, 1 | `MMIDIDX`, two zeros; version 1; code of the ids' type (4 int32, 8 uint16) |
| 8, 8 | sequences; entries of the document index |
| 4 each | tokens of each sequence, int32 |
| 8 each | its first byte in NAME.bin, int64 |
| 8 each | the document index, int64; [0] in the official files |
"""

import hashlib
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from yuanmoe.data.permutation import Integers
from yuanmoe.data.sets.documents import Documents, check_ids, no_progress
from yuanmoe.errors import DataError, ResourceError
from yuanmoe.storage.whole_file import whole_file

MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
DTYPES = {4: np.dtype("<i4"), 8: np.dtype("<u2")}

BLOCK_DOCUMENTS = 1 << 16


class MegatronTokens:
    """An open pair; a `Documents`."""

    def __init__(self, prefix: str | Path) -> None:
        """`prefix` is the name without suffix. Raises DataError with the numbers when the files do not fit together."""
        self.name = str(prefix)
        self.vocab_size: int | None = None
        self._index, self._data = megatron_files(prefix)
        self.num_documents, code = self._read_header()
        sizes_at = _HEADER.size
        self._sizes = np.memmap(self._index, "<i4", "r", sizes_at, (self.num_documents,))
        self._pointers = np.memmap(self._index, "<i8", "r", sizes_at + 4 * self.num_documents, (self.num_documents,))
        self._dtype = DTYPES[code]
        self._check_places()
        self.num_tokens = int(self._sizes.sum(dtype=np.int64))
        self.num_bytes = self._index.stat().st_size + self._data.stat().st_size
        self._ids = np.memmap(self._data, self._dtype, "r") if self._data.stat().st_size else np.empty(0, self._dtype)

    @property
    def fingerprint(self) -> str:
        """Of the index, and the size of what it points into."""
        digest = hashlib.sha256(str(self._data.stat().st_size).encode())
        with self._index.open("rb") as file:
            return hashlib.file_digest(file, lambda: digest).hexdigest()

    def lengths(self, documents: Integers) -> Integers:
        """Tokens of each of `documents`."""
        return self._sizes[documents].astype(np.int64)

    def read(self, document: int, start: int, stop: int) -> Integers:
        """Tokens `start` to `stop` of one document."""
        first = int(self._pointers[document]) // self._dtype.itemsize
        return self._ids[first + start : first + stop].astype(np.int64)

    def mask(self, document: int, start: int, stop: int) -> None:  # noqa: ARG002
        """None: all tokens are to be learned."""
        return None

    def _read_header(self) -> tuple[int, int]:
        """How many sequences there are, and the code of the type of ids."""
        size = self._index.stat().st_size
        with self._index.open("rb") as file:
            header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(MAGIC):
            raise DataError(
                f"{self._index} has {size} bytes and begins with {header[:9]!r}, a Megatron index with {MAGIC!r}; "
                "it is cut short or something else: fetch it again"
            )
        _, version, code, sequences, entries = _HEADER.unpack(header)
        if version != 1 or code not in DTYPES:
            raise DataError(
                f"{self._index} is of version {version} with ids of type {code}; readable are version 1 and the types "
                f"{' and '.join(f'{each} ({DTYPES[each].name})' for each in DTYPES)}: preprocess the text again"
            )
        wanted = _HEADER.size + 12 * sequences + 8 * entries
        if size != wanted or not sequences:
            raise DataError(
                f"{self._index} has {size} bytes where {sequences} sequences and {entries} documents take {wanted}; "
                "it is damaged or empty: fetch it again"
            )
        return sequences, code

    def _check_places(self) -> None:
        """Every sequence must lie inside of NAME.bin."""
        size = self._data.stat().st_size
        for start in range(0, self.num_documents, BLOCK_DOCUMENTS):
            sizes = self._sizes[start : start + BLOCK_DOCUMENTS].astype(np.int64)
            pointers = np.asarray(self._pointers[start : start + BLOCK_DOCUMENTS])
            # Without a sum that could overflow: a pointer may be any number.
            room = (size - np.clip(pointers, 0, size)) // self._dtype.itemsize
            wrong = (sizes < 0) | (pointers < 0) | (pointers % self._dtype.itemsize != 0) | (sizes > room)
            if wrong.any():
                place = int(wrong.argmax())
                raise DataError(
                    f"{self._data} has {size} bytes; sequence {start + place} of {self._index.name} needs "
                    f"{sizes[place]} tokens of {self._dtype.itemsize} bytes at byte {pointers[place]}: one of the two "
                    "is damaged or cut short, fetch both again"
                )


def megatron_files(prefix: str | Path) -> tuple[Path, Path]:
    """The index and the data under a name. Raises DataError where one is missing."""
    index, data = (Path(f"{prefix}{suffix}") for suffix in (".idx", ".bin"))
    for path in (index, data):
        if not path.is_file():
            raise DataError(f"{path} is missing; a Megatron dataset is two files, {index.name} and {data.name}")
    return index, data


def write_megatron(
    documents: Documents, prefix: str | Path, *, vocab_size: int, progress: Callable[[int, int], None] = no_progress
) -> None:
    """Write a pair under the name `prefix`, as the official preprocessing does, but in the smallest type.

    Ids take two bytes where the vocabulary allows it, four elsewhere. A loss mask has no place in this format and is
    left behind. `progress` receives bytes. Raises DataError when there is such a pair or it cannot be one, and
    ResourceError.
    """
    index, data = (Path(f"{prefix}{suffix}") for suffix in (".idx", ".bin"))
    for path in (index, data):
        if path.exists():
            raise DataError(f"{path} exists and is left as it is; choose another name, or remove it")
    lengths = documents.lengths(np.arange(documents.num_documents))
    if lengths.max() >= 2**31:
        raise DataError(f"a document of {lengths.max()} tokens is too long for Megatron's format; split it")
    code = 8 if vocab_size <= 2**16 else 4
    try:
        data.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(index) as header, whole_file(data) as file:
            pointers = (np.cumsum(lengths) - lengths) * DTYPES[code].itemsize
            header.write(_HEADER.pack(MAGIC, 1, code, len(lengths), 1))
            header.write(lengths.astype("<i4").tobytes() + pointers.astype("<i8").tobytes() + bytes(8))
            for document, length in enumerate(lengths.tolist()):
                ids = documents.read(document, 0, length)
                check_ids(ids, vocab_size, f"document {document} of {documents.name}")
                file.write(ids.astype(DTYPES[code]).tobytes())
                progress(file.tell(), documents.num_tokens * DTYPES[code].itemsize)
    except OSError as error:
        raise ResourceError(
            f"cannot write {error.filename or data}: {error.strerror}; make room or choose another disk, then run the "
            "same command again"
        ) from error
