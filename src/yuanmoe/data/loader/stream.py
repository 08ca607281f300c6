"""One epoch of one source: its documents in an order of chance, one after another, as a row of tokens.

Any part of the row is found at once. Memory: 8 bytes for every 64 documents (12 MB for 100 million) and 4 MB; building
it reads the length of every document once. Legend: T tokens of a part.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from yuanmoe.data.loader.fim import FillInMiddle, Piece
from yuanmoe.data.permutation import Integers, Permutation
from yuanmoe.data.sets.documents import Documents
from yuanmoe.errors import DataError

GROUP = 64
"""Documents between two known places."""

BLOCK = 256 * GROUP
"""Documents whose lengths are read at once."""

KEPT_GROUPS = 4096
"""Groups that are remembered, with 16 bytes a document: all of a small source, 4 MB at most."""


class DocumentPart(NamedTuple):
    """A part of the row, all [T]."""

    ids: Integers
    learned: npt.NDArray[np.bool_]
    documents: Integers
    """Numbers that change where a new document begins, from 0."""


class ShuffledStream:
    """The row of tokens that `key` gives."""

    def __init__(self, source: Documents, *, key: int, fim: FillInMiddle | None, span: int) -> None:
        """`span` is the longest that is rearranged at once. Raises DataError for lengths that are none."""
        self._source, self._key, self._fim, self._span = source, key, fim, span
        self._order = Permutation(source.num_documents, key)
        self._group = lru_cache(KEPT_GROUPS)(self._documents)
        sums = [np.zeros(1, np.int64)]
        for first in range(0, source.num_documents, BLOCK):
            lengths = self._documents(first, min(first + BLOCK, source.num_documents))[1]
            sums.append(np.add.reduceat(lengths, np.arange(0, len(lengths), GROUP)))
        self._starts = np.cumsum(np.concatenate(sums))  # of each group, and the end of the last

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> DocumentPart:
        """The tokens from `start` to `stop` of the row, which must have them."""
        group = int(np.searchsorted(self._starts, start, side="right")) - 1
        offset = int(self._starts[group])
        ids, learned, sizes = [], [], []
        while offset < stop:
            first = group * GROUP
            documents, lengths = self._group(first, min(first + GROUP, self._source.num_documents))
            ends = offset + np.cumsum(lengths)
            begin, end = int(np.searchsorted(ends, start, side="right")), int(np.searchsorted(ends, stop))
            for place in range(begin, min(end + 1, len(documents))):
                origin = int(ends[place] - lengths[place])
                here, mask = self._of_document(int(documents[place]), max(start - origin, 0), stop - origin)
                if len(here):
                    ids.append(here)
                    learned.append(mask)
                    sizes.append(len(here))
            offset, group = int(ends[-1]), group + 1
        return DocumentPart(np.concatenate(ids), np.concatenate(learned), np.repeat(np.arange(len(sizes)), sizes))

    def _documents(self, first: int, stop: int) -> tuple[Integers, Integers]:
        """The documents at these places of the order, and their lengths in the row."""
        documents = self._order(np.arange(first, stop))
        lengths = self._source.lengths(documents)
        if lengths.min() < 0:
            raise DataError(
                f"{self._source.name} has a document of {lengths.min()} tokens, so its index is damaged; fetch it again"
            )
        if self._fim:
            lengths = lengths + self._fim.added(documents, lengths, span=self._span, key=self._key)
        return documents, lengths

    def _of_document(self, document: int, start: int, stop: int) -> tuple[Integers, npt.NDArray[np.bool_]]:
        """Tokens `start` to `stop` of a document as it stands in the row, `stop` being anywhere behind."""
        length = int(self._source.lengths(np.array([document]))[0])
        pieces: list[Piece] = [range(length)]
        if self._fim:
            pieces = self._fim.pieces(document, length, span=self._span, key=self._key)
        ids, masks, offset = [np.empty(0, np.int64)], [np.empty(0, np.bool_)], 0
        for piece in pieces:
            size = 1 if isinstance(piece, int) else len(piece)
            begin, end = max(start - offset, 0), min(stop - offset, size)
            offset += size
            if begin < end:
                part = np.array([piece]) if isinstance(piece, int) else self._tokens(document, piece[begin:end])
                mask = None if isinstance(piece, int) else self._mask(document, piece[begin:end])
                ids.append(part)
                masks.append(np.ones(len(part), np.bool_) if mask is None else mask)
        return np.concatenate(ids), np.concatenate(masks)

    def _tokens(self, document: int, places: range) -> Integers:
        return self._source.read(document, places.start, places.stop)

    def _mask(self, document: int, places: range) -> npt.NDArray[np.bool_] | None:
        return self._source.mask(document, places.start, places.stop)
