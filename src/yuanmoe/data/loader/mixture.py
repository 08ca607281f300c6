"""Which source each sample of a run comes from: weights kept exactly, in an order of chance, without a table.

Sources take turns as evenly as integers allow (Beatty sequences, nested: the first source against the rest, then the
second against what is left), and every block of turns is shuffled. So sample n and its number within its source are a
function of n: a run resumes anywhere, and any number of ranks sees one order.
The weights of Megatron's `DATA_PATH` (weight, path, weight, path, ...) are read here too.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from yuanmoe.data.permutation import Integers, Permutation, key_of
from yuanmoe.errors import DataError, UsageError

BLOCK = 1024
"""Turns that are shuffled among each other; at the end of a block every source has its share within a turn or two."""


class Mixture:
    """Takes turns among sources by `weights`, which are relative. Raises DataError for weights that are none."""

    def __init__(self, weights: Sequence[float], *, seed: int) -> None:
        for place, weight in enumerate(weights):
            if not 0 <= weight < math.inf:
                raise DataError(f"weight {weight} of source {place + 1} is no share; give a number of at least 0")
        if not sum(weights):
            raise DataError(f"the weights of {len(weights)} sources sum to 0, so none has a turn; raise one above 0")
        exact = [Fraction(weight) for weight in weights]
        self.shares = [float(weight / sum(exact)) for weight in exact]
        """Of all samples, in the order of the sources; they sum to 1."""
        # [s]: share of source s of the turns that the sources before it leave.
        self._splits = [weight / (sum(exact[place:]) or 1) for place, weight in enumerate(exact)]
        self._seed = seed
        self._block = -1
        self._turns = (np.empty(0, np.int64), np.empty(0, np.int64))

    def turns(self, numbers: Integers) -> tuple[Integers, Integers]:
        """For samples `numbers`: the source of each, and its number, from 0, within that source."""
        sources, within = np.empty_like(numbers), np.empty_like(numbers)
        blocks = numbers // BLOCK
        for block in np.unique(blocks):
            here = blocks == block
            block_sources, block_within = self._of_block(int(block))
            sources[here] = block_sources[numbers[here] % BLOCK]
            within[here] = block_within[numbers[here] % BLOCK]
        return sources, within

    def _of_block(self, block: int) -> tuple[Integers, Integers]:
        if block != self._block:
            before, after = self.counts(block * BLOCK), self.counts((block + 1) * BLOCK)
            amounts = [stop - start for start, stop in zip(before, after, strict=True)]
            order = Permutation(BLOCK, key_of("turns", self._seed, block))(np.arange(BLOCK))
            sources = np.repeat(np.arange(len(amounts)), amounts)[order]
            within = np.empty_like(sources)
            for source, (start, stop) in enumerate(zip(before, after, strict=True)):
                within[sources == source] = np.arange(start, stop)
            self._block, self._turns = block, (sources, within)
        return self._turns

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` each source has, `samples` being whole blocks."""
        counts, left = [], samples
        for split in self._splits:
            counts.append(left * split.numerator // split.denominator)
            left -= counts[-1]
        return counts


def parse_mixture(words: Sequence[str]) -> list[tuple[float, str]]:
    """Weights and paths from `weight path weight path ...`, or from paths alone, which then weigh the same.

    Raises UsageError for words that are neither.
    """
    weights = [_number(word) for word in words[::2]]
    if words and len(words) % 2 == 0 and None not in weights:
        return [(weight, path) for weight, path in zip(weights, words[1::2], strict=True) if weight is not None]
    stray = next((word for word in words if _number(word) is not None), None)
    if stray is not None or not words:
        raise UsageError(
            f"{len(words)} words, {stray!r} among them, are no mixture; write weight path weight path .., or only paths"
        )
    return [(1.0, path) for path in words]


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
