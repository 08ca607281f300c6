"""A document of a dataset on the terminal, with what is to be learned of it set apart.

Importing this file imports numpy.
"""

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from yuanmoe.data.sets.datasets import open_documents
from yuanmoe.data.sets.manifest import check_same_tokenizer
from yuanmoe.data.sets.packed import PackedTokens
from yuanmoe.errors import UsageError
from yuanmoe.text.tokenizer import Tokenizer, load_tokenizer


def preview_document(
    console: Console, path: Path, document: int, limit: int, tokenizer_path: Path | None
) -> dict[str, Any]:
    """Print the first `limit` tokens of a document; what they are, as JSON values.

    Raises UsageError for a document that is not there, and for a Megatron pair without a tokenizer.
    """
    tokens = open_documents(path)
    if document >= tokens.num_documents:
        raise UsageError(f"document {document} is outside 0..{tokens.num_documents - 1} of {path}")
    if tokenizer_path is None and not isinstance(tokens, PackedTokens):
        raise UsageError(f"{path} has no tokenizer beside it; give one with --tokenizer")
    tokenizer = load_tokenizer(tokenizer_path or path)
    if isinstance(tokens, PackedTokens):
        check_same_tokenizer(tokens.manifest, tokenizer, tokens.name)
    length = int(tokens.lengths(np.array([document]))[0])
    shown = min(limit, length)
    ids = tokens.read(document, 0, shown).tolist()
    stored = tokens.mask(document, 0, shown)
    mask = [True] * shown if stored is None else stored.tolist()
    colour = console.is_terminal and not console.no_color
    console.print(marked(tokenizer, ids, mask, colour=colour), soft_wrap=True)
    learned = f"{sum(mask)} of {shown} tokens are learned" + (
        "" if shown == length else f", {length - shown} more follow"
    )
    console.print(f"document {document} of {tokens.num_documents:,}: {learned}", style="dim", soft_wrap=True)
    return {
        "path": str(path),
        "document": document,
        "tokens": length,
        "ids": ids,
        "learned": [int(each) for each in mask],
    }


def marked(tokenizer: Tokenizer, ids: list[int], mask: list[bool], *, colour: bool) -> Text:
    """Tokens as text: what is learned in green, or between `{+` and `+}` where there is no colour."""
    text = Text()
    previous = None
    for learned, run in groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]):
        part = [token_id for token_id, _ in run]
        spelled = tokenizer.decode(part, previous=previous)
        previous = part[-1]
        if colour:
            text.append(spelled, style="green" if learned else "dim")
        else:
            text.append(f"{{+{spelled}+}}" if learned else spelled)
    return text
