"""Tokenized text on disk: the ids of all documents, one after another, and a small JSON beside them.

`NAME.bin` holds unsigned little-endian integers of two bytes, or four where the vocabulary is larger; every document
ends with `<eod>`. `NAME.json` says what is in it and is written last: without it there is no shard.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yuanmoe.data.tokenizer import Tokenizer
from yuanmoe.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardIndex:
    """What `NAME.json` says."""

    num_tokens: int
    """The `<eod>` of every document included."""
    num_documents: int
    text_bytes: int
    """Of the documents as UTF-8; a loss in bits is divided by them."""
    vocab_size: int
    """Of the tokenizer."""
    sha256: str
    """Of `NAME.bin`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """An open shard; `ids` [tokens] are read from the disk as they are touched."""

    index: ShardIndex
    ids: npt.NDArray[Any]

    @property
    def bytes_per_token(self) -> float:
        return self.index.text_bytes / self.index.num_tokens


def write_shard(path: Path, texts: Iterable[str], tokenizer: Tokenizer) -> Shard:
    """Tokenize documents into `path`, a name without suffix, and open it; special strings in them are plain text.

    Raises DataError when there is no text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").unlink(missing_ok=True)
    dtype = _dtype(tokenizer.vocab_size)
    digest = hashlib.sha256()
    num_tokens = num_documents = text_bytes = 0
    with path.with_suffix(".bin").open("wb") as file:
        for text in texts:
            ids = np.array([*tokenizer.encode(text, allow_special=False), tokenizer.eod_id], dtype=dtype)
            file.write(ids.tobytes())
            digest.update(ids.tobytes())
            num_tokens += len(ids)
            num_documents += 1
            text_bytes += len(text.encode())
        file.flush()
        os.fsync(file.fileno())
    if text_bytes == 0:
        raise DataError(f"no text for {path}: {num_documents} documents without a character; give it more")
    index = ShardIndex(
        num_tokens=num_tokens,
        num_documents=num_documents,
        text_bytes=text_bytes,
        vocab_size=tokenizer.vocab_size,
        sha256=digest.hexdigest(),
    )
    beside = path.with_suffix(".json.partial")
    beside.write_text(json.dumps(asdict(index), indent=2) + "\n", encoding="utf-8")
    beside.replace(path.with_suffix(".json"))
    return open_shard(path)


def open_shard(path: Path) -> Shard:
    """The shard of that name, without reading it. Raises DataError when it is missing, damaged or cut short."""
    data = path.with_suffix(".bin")
    index = _read_index(path.with_suffix(".json"))
    dtype = _dtype(index.vocab_size)
    size = data.stat().st_size if data.is_file() else 0
    if size != index.num_tokens * dtype.itemsize:
        raise DataError(
            f"{data} has {size} bytes where {index.num_tokens} tokens take {index.num_tokens * dtype.itemsize}; "
            "it is damaged: make it again"
        )
    return Shard(index=index, ids=np.memmap(data, dtype=dtype, mode="r"))


def _read_index(file: Path) -> ShardIndex:
    try:
        return ShardIndex(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise DataError(f"{file} is missing, so there are no finished tokens; make them again") from None
    except (ValueError, TypeError) as error:
        raise DataError(f"{file} does not describe tokens ({error}); make them again") from error


def _dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
