"""Windows of consecutive tokens, to train on and to measure with.

A batch to train on is a function of the seed and its number, so that the state of a loader is one integer.
Legend: B windows, S tokens that a window teaches (a window has S + 1: the last one is only a target).
"""

import numpy as np
import numpy.typing as npt

from yuanmoe.errors import DataError

Windows = npt.NDArray[np.int64]
"""[B, S + 1]."""


class ShuffledWindows:
    """The windows of a token array in an order of chance, every one once an epoch, cut elsewhere in every epoch."""

    def __init__(self, ids: npt.NDArray[np.unsignedinteger], *, length: int, batch_size: int, seed: int) -> None:
        """Raises DataError when the tokens do not fill one batch of `batch_size` windows of `length`."""
        # One window less than there could be leaves room to shift the cuts.
        self._per_epoch = (len(ids) - 1) // length - 1
        if self._per_epoch < batch_size:
            raise DataError(
                f"{len(ids)} tokens are too few for batches of {batch_size} windows of {length}: "
                f"they need {(batch_size + 1) * length + 1}; give more text, or ask for a smaller batch or length"
            )
        self._ids, self._length, self._batch_size, self._seed = ids, length, batch_size, seed
        self._epoch = -1
        self._starts = np.empty(0, dtype=np.int64)

    def batch(self, number: int) -> Windows:
        """The batch of that number, from 0."""
        first = number * self._batch_size
        places = range(first, first + self._batch_size)
        return np.stack([self._window(place) for place in places])

    def _window(self, place: int) -> npt.NDArray[np.int64]:
        epoch, index = divmod(place, self._per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng([self._seed, epoch])
            shift = rng.integers(self._length)
            self._starts = shift + self._length * rng.permutation(self._per_epoch)
            self._epoch = epoch
        start = self._starts[index]
        return self._ids[start : start + self._length + 1].astype(np.int64)


def consecutive_windows(ids: npt.NDArray[np.unsignedinteger], *, length: int) -> Windows:
    """All windows in order, for measuring a loss; a rest shorter than a window is left out.

    Raises DataError when there is no window.
    """
    if len(ids) <= length:
        raise DataError(f"{len(ids)} tokens are too few for one window of {length} and its last target; give more text")
    starts = range(0, len(ids) - length, length)
    return np.stack([ids[start : start + length + 1].astype(np.int64) for start in starts])
