"""Documents of token ids in memory, for tests of what reads them."""

import numpy as np


class Lists:
    """A `Documents` over lists, with a mask where `masks` are given."""

    def __init__(self, documents, *, masks=None, name="lists", vocab_size=None):
        self.name, self.vocab_size = name, vocab_size
        self._documents = [np.array(ids, dtype=np.int64) for ids in documents]
        self._masks = masks
        self.num_documents = len(documents)
        self.num_tokens = sum(map(len, documents))

    @property
    def fingerprint(self):
        return f"{self.name}-{self.num_tokens}"

    def lengths(self, documents):
        return np.array([len(self._documents[document]) for document in documents], dtype=np.int64)

    def read(self, document, start, stop):
        return self._documents[document][start:stop]

    def mask(self, document, start, stop):
        return None if self._masks is None else np.array(self._masks[document][start:stop], dtype=np.bool_)


def numbered(lengths, first=0):
    """Documents in which no token comes twice."""
    ends = np.cumsum(lengths) + first
    return Lists([range(end - length, end) for end, length in zip(ends, lengths, strict=True)])
