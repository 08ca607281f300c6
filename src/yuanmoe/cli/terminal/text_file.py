"""Texts and tokens that a command is given as files."""

from pathlib import Path
from typing import TYPE_CHECKING

from yuanmoe.errors import UsageError

if TYPE_CHECKING:
    from yuanmoe.text.tokenizer import Tokenizer

LONGEST_TOKEN = 64
"""Characters; of a large file no more are tokenized than the tokens wanted can hold."""


def read_text(path: Path) -> str:
    """The text in a UTF-8 file, with or without a byte order mark. Raises UsageError for another file."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}; convert it first, "
            f"for example with iconv -f ISO-8859-1 -t UTF-8"
        ) from error
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def read_tokens(path: Path, tokenizer: "Tokenizer", limit: int) -> list[int]:
    """The first `limit` tokens of a text, as a document after `<eod>`, or of a dataset.

    Raises UsageError for a file that is neither or holds fewer than two tokens, and DataError for damaged tokens.
    """
    if path.is_dir():
        from yuanmoe.data.sets.packed import PackedTokens

        ids = PackedTokens(path)[:limit].tolist()
    else:
        text = read_text(path)[: LONGEST_TOKEN * limit]
        ids = [tokenizer.eod_id, *tokenizer.encode(text)][:limit]
    if len(ids) < 2:
        raise UsageError(f"{path} has {len(ids)} tokens; at least 2 are needed, and some thousands tell more")
    return ids
