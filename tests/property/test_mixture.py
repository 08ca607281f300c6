"""Orders of chance that are computed, and sources that take turns: nothing twice, nothing left out, shares kept."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yuanmoe.data.loader.mixture import BLOCK, Mixture, parse_mixture
from yuanmoe.data.permutation import Permutation, key_of, scatter
from yuanmoe.errors import DataError, UsageError

WEIGHTS = st.lists(st.floats(0, 100, allow_subnormal=False), min_size=1, max_size=6).filter(any)


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_a_permutation_has_every_number_once_and_any_place_alone(size, key):
    order = Permutation(size, key)
    whole = order(np.arange(size))
    assert np.array_equal(np.sort(whole), np.arange(size))
    places = np.array([size - 1, 0, size // 2])
    assert np.array_equal(order(places), whole[places])


def test_a_permutation_is_none_that_anyone_would_see_through():
    """Of 4 numbers all 24 orders come about equally often; neighbours of many are no neighbours, and keys differ."""
    orders = [tuple(Permutation(4, key_of("test", seed))(np.arange(4)).tolist()) for seed in range(2400)]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert 60 < counts.min() <= counts.max() < 145  # 100 each, standard deviation 10
    large = Permutation(10**12, 1)(np.arange(100_000))
    assert abs(np.corrcoef(large[:-1], large[1:])[0, 1]) < 0.02
    assert abs(large.mean() / 10**12 - 0.5) < 0.01
    assert not np.array_equal(large, Permutation(10**12, 2)(np.arange(100_000)))


def test_scattered_numbers_are_even():
    shares = scatter(np.arange(100_000), 7) / 2.0**64
    assert np.histogram(shares, bins=10, range=(0, 1))[0] == pytest.approx(10_000, rel=0.05)


@given(weights=WEIGHTS, seed=st.integers(0, 2**40), block=st.integers(0, 2000))
def test_sources_have_their_share_of_every_block(weights, seed, block):
    mixture = Mixture(weights, seed=seed)
    sources, within = mixture.turns(np.arange(block * BLOCK, (block + 1) * BLOCK))
    for source, weight in enumerate(weights):
        share = weight / sum(weights)
        turns = within[sources == source]
        assert abs(len(turns) - share * BLOCK) <= len(weights)
        assert np.array_equal(turns, np.arange(len(turns)) + (turns[0] if len(turns) else 0)), "one after another"
        after = block * BLOCK + BLOCK
        assert abs(mixture.counts(after)[source] - share * after) <= len(weights), "errors do not add up"


@given(weights=WEIGHTS, seed=st.integers(0, 2**40), numbers=st.lists(st.integers(0, 3 * BLOCK), min_size=1))
def test_any_turn_stands_alone(weights, seed, numbers):
    whole = Mixture(weights, seed=seed).turns(np.arange(3 * BLOCK + 1))
    some = Mixture(weights, seed=seed).turns(np.array(numbers))
    assert all(np.array_equal(one[numbers], other) for one, other in zip(whole, some, strict=True))


def test_blocks_are_shuffled_by_the_seed():
    turns = [Mixture([1, 1], seed=seed).turns(np.arange(64))[0].tolist() for seed in (0, 1)]
    assert turns[0] != turns[1]
    assert turns[0] != [0] * 32 + [1] * 32


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0, 0.0], "the weights of 2 sources sum to 0, so none has a turn"),
        ([1, -2], "weight -2 of source 2 is no share"),
        ([float("nan")], "weight nan of source 1 is no share"),
        ([float("inf"), 1], "weight inf of source 1"),
    ],
)
def test_weights_that_are_none(weights, message):
    with pytest.raises(DataError, match=message):
        Mixture(weights, seed=0)


def test_mixtures_in_words():
    assert parse_mixture(["25.2", "web", "47.5", "code"]) == [(25.2, "web"), (47.5, "code")]
    assert parse_mixture(["web", "code", "books"]) == [(1.0, "web"), (1.0, "code"), (1.0, "books")]
    assert parse_mixture(["1", "2"]) == [(1.0, "2")]
    with pytest.raises(UsageError, match=r"3 words, '0\.3' among them, are no mixture; write weight path"):
        parse_mixture(["web", "0.3", "code"])
