"""Fill in the middle: documents rearranged, so that a model learns to write what lies between two texts.

Sources: arXiv 2311.15786 section 4 and IEIT-Yuan/Yuan2.0-M32 (megatron/data/gpt_dataset.py) for the tokens and the two
orders; Bavarian et al. 2022, arXiv 2207.14255, for the idea. Unlike the released code, which rearranges what a window
happens to hold as text, this works on tokens of whole documents before they are cut into windows: no space appears
where none was, nothing is cut away, and nothing is padded.
"""

from dataclasses import dataclass

import numpy as np

from yuanmoe.data.permutation import Integers, scatter
from yuanmoe.errors import TokenizerError, UsageError
from yuanmoe.text.tokenizer import FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX, Tokenizer

Piece = int | range
"""A special token, or a range of a document's own tokens."""

MARKS = 3
"""Tokens that a rearranged span has more than before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FillInMiddle:
    """How much is rearranged, and with which tokens. Raises UsageError for rates that are none."""

    rate: float = 0.5
    """Share of documents."""
    spm_rate: float = 0.5
    """Share of those whose suffix comes first."""
    prefix_id: int
    suffix_id: int
    middle_id: int

    def __post_init__(self) -> None:
        for name in ("rate", "spm_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"FIM {name} is {getattr(self, name)}; it is a share, from 0 to 1")

    @classmethod
    def of(cls, tokenizer: Tokenizer, *, rate: float, spm_rate: float = 0.5) -> "FillInMiddle":
        """With the tokens of a tokenizer. Raises TokenizerError where it has none."""
        missing = [name for name in (FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE) if name not in tokenizer.special_tokens]
        if missing:
            raise TokenizerError(
                f"fill in the middle needs the tokens {', '.join(missing)}, which {tokenizer.file_name} lacks; set its "
                "rate to 0, or use Yuan's tokenizer"
            )
        ids = tokenizer.special_tokens
        return cls(
            rate=rate,
            spm_rate=spm_rate,
            prefix_id=ids[FIM_PREFIX],
            suffix_id=ids[FIM_SUFFIX],
            middle_id=ids[FIM_MIDDLE],
        )

    def added(self, documents: Integers, lengths: Integers, *, span: int, key: int) -> Integers:
        """How many tokens longer each of `documents` becomes; see `pieces`."""
        return np.where(self._chosen(documents, key), MARKS * _spans(lengths, span), 0)

    def pieces(self, document: int, length: int, *, span: int, key: int) -> list[Piece]:
        """The tokens of a document in their new order.

        The last token, `<eod>`, stays the last. A document is rearranged in spans of at most `span` tokens, so that the
        three parts of a span may meet in one window.
        """
        one = np.array([document])
        count = int(_spans(np.array([length]), span)[0])
        if not count or not self._chosen(one, key)[0]:
            return [range(length)]
        bounds = [(length - 1) * place // count for place in range(count + 1)]
        chances = scatter(np.arange(3 * count), int(scatter(one, key ^ 1)[0])).tolist()
        pieces: list[Piece] = []
        for place in range(count):
            pieces += self._rearranged(bounds[place], bounds[place + 1], chances[3 * place : 3 * place + 3])
        return [*pieces, range(length - 1, length)]

    def _rearranged(self, start: int, stop: int, chances: list[int]) -> list[Piece]:
        first, second = sorted(start + chance % (stop - start + 1) for chance in chances[:2])
        prefix, middle, suffix = range(start, first), range(first, second), range(second, stop)
        if chances[2] < self.spm_rate * 2**64:
            return [self.prefix_id, self.suffix_id, suffix, self.middle_id, prefix, middle]
        return [self.prefix_id, prefix, self.suffix_id, suffix, self.middle_id, middle]

    def _chosen(self, documents: Integers, key: int) -> np.ndarray:
        return scatter(documents, key) < self.rate * 2.0**64


def _spans(lengths: Integers, span: int) -> Integers:
    """In how many spans a document of each length is rearranged: none where it is empty but for its end."""
    return -(-np.maximum(lengths - 1, 0) // span)
