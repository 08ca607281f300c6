"""Windows of tokens: every one once an epoch, the same for the same seed, and any batch without those before it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yuanmoe.data.loader import ShuffledWindows, consecutive_windows
from yuanmoe.errors import DataError


@st.composite
def cases(draw):
    length = draw(st.integers(1, 9))
    batch_size = draw(st.integers(1, 5))
    windows = draw(st.integers(batch_size, 40))
    ids = np.arange((windows + 1) * length + 1 + draw(st.integers(0, length - 1)), dtype=np.uint16)
    return ids, length, batch_size, windows


@given(case=cases(), seed=st.integers(0, 2**40))
def test_an_epoch_has_every_window_once_and_any_batch_stands_alone(case, seed):
    ids, length, batch_size, windows = case
    loader = ShuffledWindows(ids, length=length, batch_size=batch_size, seed=seed)
    batches = [loader.batch(number) for number in range(2 * windows)]
    order = np.concatenate(batches)
    assert (np.diff(order, axis=1) == 1).all()
    for epoch in (0, 1):
        starts = np.sort(order[epoch * windows : (epoch + 1) * windows, 0])
        assert starts[0] < length
        assert (np.diff(starts) == length).all()
    again = ShuffledWindows(ids, length=length, batch_size=batch_size, seed=seed)
    for number in (2 * windows - 1, 0, windows):
        assert np.array_equal(again.batch(number), batches[number])


def test_seeds_and_epochs_differ():
    ids = np.arange(1001, dtype=np.uint16)
    loaders = [ShuffledWindows(ids, length=10, batch_size=99, seed=seed) for seed in (1, 2)]
    first, second = (loader.batch(0) for loader in loaders)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, loaders[0].batch(1))


@given(length=st.integers(1, 9), extra=st.integers(1, 50))
def test_consecutive_windows_teach_every_token_once_but_a_short_rest(length, extra):
    ids = np.arange(length + extra, dtype=np.uint32)
    windows = consecutive_windows(ids, length=length)
    assert windows.dtype == np.int64
    targets = windows[:, 1:].flatten()
    assert np.array_equal(targets, np.arange(1, len(targets) + 1))
    assert len(ids) - 1 - len(targets) < length


def test_too_few_tokens_are_refused_with_the_numbers():
    ids = np.zeros(30, dtype=np.uint16)
    with pytest.raises(DataError, match="30 tokens are too few for batches of 3 windows of 10: they need 41"):
        ShuffledWindows(ids, length=10, batch_size=3, seed=0)
    with pytest.raises(DataError, match="30 tokens are too few for one window of 30"):
        consecutive_windows(ids, length=30)
