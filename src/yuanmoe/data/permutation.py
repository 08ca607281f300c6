"""An order of chance that is computed, not stored: any place of it at once, in constant memory, for any size.

Source: Luby and Rackoff 1988 (a Feistel network permutes), Black and Rogaway 2002 section 3 (walking its cycles stays
inside any size); the round function is the finalizer of splitmix64 (Steele et al. 2014). Not for secrets.
"""

import hashlib

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]

ROUNDS = 6
"""Four already permute well; two more cost little and make small sizes even."""


def key_of(*parts: int | str) -> int:
    """A key of 64 bits for each different sequence of seeds, names and numbers."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest())


def scatter(values: npt.NDArray[np.integer], key: int) -> npt.NDArray[np.uint64]:
    """Evenly spread 64-bit numbers, one for each value; another key gives others."""
    mixed = values.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed += np.uint64(key)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


class Permutation:
    """The numbers 0..size-1 in an order that `key` decides."""

    def __init__(self, size: int, key: int) -> None:
        assert 0 < size < 2**62, size
        bits = (size - 1).bit_length()
        self._size = np.uint64(size)
        self._low_bits = np.uint64(bits // 2)
        self._low = np.uint64((1 << bits // 2) - 1)
        self._high = np.uint64((1 << (bits - bits // 2)) - 1)
        self._keys = [key_of(key, number) for number in range(ROUNDS)]

    def __call__(self, places: Integers) -> Integers:
        """What stands at `places`, each of 0..size-1."""
        values = self._scramble(places.astype(np.uint64))
        # The network permutes the next power of two, less than twice the size: outside of it, go on from there.
        while (outside := values >= self._size).any():
            values[outside] = self._scramble(values[outside])
        return values.astype(np.int64)

    def _scramble(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        high, low = values >> self._low_bits, values & self._low
        for number, key in enumerate(self._keys):
            if number % 2:
                low ^= scatter(high, key) & self._low
            else:
                high ^= scatter(low, key) & self._high
        return (high << self._low_bits) | low
