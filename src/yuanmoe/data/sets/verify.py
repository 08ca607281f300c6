"""Whether all of a dataset is as it was written: every byte is read once, and every id looked at."""

import hashlib
from collections.abc import Callable

import numpy as np

from yuanmoe.data.sets.documents import check_ids, no_progress
from yuanmoe.data.sets.manifest import ENDS, check_same_tokenizer
from yuanmoe.data.sets.megatron import MegatronTokens
from yuanmoe.data.sets.packed import PackedTokens
from yuanmoe.errors import DataError
from yuanmoe.text.tokenizer import Tokenizer

BLOCK_BYTES = 1 << 20
BLOCK_DOCUMENTS = 1 << 16


def verify_dataset(
    tokens: PackedTokens | MegatronTokens,
    tokenizer: Tokenizer | None = None,
    progress: Callable[[int, int], None] = no_progress,
) -> int:
    """The bytes that were read and found right. Raises DataError naming the damaged file, document or id."""
    if isinstance(tokens, PackedTokens):
        if tokenizer is not None:
            check_same_tokenizer(tokens.manifest, tokenizer, tokens.name)
        read = _check_sums(tokens, progress)
        _check_order(tokens)
        return read
    return _check_documents(tokens, 2**31 if tokenizer is None else tokenizer.vocab_size, progress)


def _check_sums(tokens: PackedTokens, progress: Callable[[int, int], None]) -> int:
    manifest = tokens.manifest
    done, total = 0, sum(entry["bytes"] for entry in manifest.files.values())
    for name, entry in manifest.files.items():
        digest = hashlib.sha256()
        with (tokens.path / name).open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
                if name.endswith(".bin"):
                    ids = np.frombuffer(block, f"<u{manifest.id_bytes}")
                    check_ids(ids, manifest.vocab_size, str(tokens.path / name))
                done += len(block)
                progress(done, total)
        if digest.hexdigest() != entry["sha256"]:
            raise DataError(
                f"{tokens.path / name} is damaged: its sha256 is {digest.hexdigest()[:12]}.., "
                f"{str(entry['sha256'])[:12]}.. was written; fetch it again, or pack the tokens again"
            )
    return done


def _check_order(tokens: PackedTokens) -> None:
    """Documents must follow one another up to the last token."""
    end = 0
    for first in range(0, tokens.num_documents, BLOCK_DOCUMENTS):
        lengths = tokens.lengths(np.arange(first, min(first + BLOCK_DOCUMENTS, tokens.num_documents)))
        end += int(lengths.sum())
        if lengths.min() < 0:
            raise DataError(f"{tokens.path / ENDS} has a document of {lengths.min()} tokens; pack the tokens again")
    if end != tokens.num_tokens:
        raise DataError(f"{tokens.path / ENDS} ends at token {end} of {tokens.num_tokens}; pack the tokens again")


def _check_documents(tokens: MegatronTokens, vocab_size: int, progress: Callable[[int, int], None]) -> int:
    done = 0
    for document, length in enumerate(tokens.lengths(np.arange(tokens.num_documents)).tolist()):
        check_ids(tokens.read(document, 0, length), vocab_size, f"document {document} of {tokens.name}")
        done += length
        progress(tokens.num_bytes * done // tokens.num_tokens, tokens.num_bytes)
    return tokens.num_bytes
