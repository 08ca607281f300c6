"""What the loader asks of a source of tokens, whatever its format: documents, numbered from 0.

Datasets (`packed.py`) and Megatron's pairs (`megatron.py`) answer it; `datasets.py` opens either.
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt

from yuanmoe.data.permutation import Integers
from yuanmoe.errors import DataError


class Documents(Protocol):
    """Documents of token ids, numbered from 0, whatever file format they come from."""

    name: str
    num_documents: int
    num_tokens: int
    vocab_size: int | None
    """Every id is below it; None where the format does not say."""

    @property
    def fingerprint(self) -> str:
        """Another one for other documents."""
        ...

    def lengths(self, documents: Integers) -> Integers:
        """Tokens of each of `documents`."""
        ...

    def read(self, document: int, start: int, stop: int) -> Integers:
        """Tokens `start` to `stop` of one document."""
        ...

    def mask(self, document: int, start: int, stop: int) -> npt.NDArray[np.bool_] | None:
        """Which of them are to be learned; None is all, of this document and of every other."""
        ...


def check_ids(ids: npt.NDArray[np.integer], vocab_size: int, name: str) -> None:
    """Raise DataError, which speaks of `name`, unless all ids are of a vocabulary."""
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        worst = ids.min() if ids.min() < 0 else ids.max()
        raise DataError(
            f"{name} holds the token id {worst}, outside the vocabulary of {vocab_size}; it was made with another "
            "tokenizer than the model's, or is damaged (yuanmoe data verify)"
        )


def no_progress(done: int, total: int) -> None:
    """Hears how far something is, and does nothing."""
