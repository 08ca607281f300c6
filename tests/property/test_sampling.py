"""Sampling: filters against naive ones, draws against probabilities, and a stream that is the sequence's own."""

import math

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from small_models import random_ids
from yuanmoe.engine import sampling
from yuanmoe.engine.sampling import (
    Sampler,
    SamplingParams,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    require_numbers,
    sample,
    top_logprobs,
)
from yuanmoe.errors import CheckpointError, UsageError

# Few different values, so that rows are full of ties; -inf is what a grammar or an earlier filter leaves.
SCORE = st.sampled_from([-math.inf, -3.0, -1.0, -0.5, 0.0, 0.25, 1.0, 2.0]) | st.floats(-8, 8, width=32)
ROW = st.lists(SCORE, min_size=1, max_size=12).filter(lambda row: max(row) > -math.inf)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.integers(0, 9),
    top_p=st.sampled_from([0.2, 0.7, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.4]),
    logit_bias=st.sampled_from([{}, {3: 2.5, 7: -100.0}]),
    seed=st.integers(0, 2**63 - 1),
)


def kept(scores: torch.Tensor) -> list[set[int]]:
    return [{token for token, score in enumerate(row) if score > -math.inf} for row in scores.tolist()]


def probabilities(row: list[float]) -> list[float]:
    return torch.tensor(row).softmax(dim=-1).tolist()


def naive_top_k(row: list[float], k: int) -> set[int]:
    smallest = sorted(row, reverse=True)[:k][-1] if k else -math.inf
    return {token for token, score in enumerate(row) if score >= smallest and score > -math.inf}


def naive_top_p(row: list[float], p: float) -> set[int]:
    shares = probabilities(row)
    mass, smallest = 0.0, 0.0
    for share in sorted(shares, reverse=True):
        if mass >= p:
            break
        mass, smallest = mass + share, share
    smallest = 0.0 if p == 1 else smallest
    return {token for token, share in enumerate(shares) if share >= smallest and row[token] > -math.inf}


def naive_min_p(row: list[float], p: float) -> set[int]:
    smallest = max(row) + math.log(p) if p else -math.inf
    return {token for token, score in enumerate(row) if score >= smallest and score > -math.inf}


def rows_with(limits):
    """Rows of different widths, each with a parameter of its own."""
    return st.lists(st.tuples(ROW, limits), min_size=1, max_size=4)


def padded(rows):
    """The rows as one tensor, their parameters, and both again as pairs."""
    widest = max(len(row) for row, _ in rows)
    pairs = [(row + [-math.inf] * (widest - len(row)), limit) for row, limit in rows]
    return torch.tensor([row for row, _ in pairs]), [limit for _, limit in pairs], pairs


@settings(max_examples=60)
@given(rows=rows_with(st.integers(0, 14)))
def test_top_k_keeps_the_k_largest_and_their_ties(rows):
    scores, limits, pairs = padded(rows)
    assert kept(keep_top_k(scores, limits)) == [naive_top_k(*pair) for pair in pairs]


@settings(max_examples=60)
@given(rows=rows_with(st.sampled_from([0.01, 0.3, 0.6, 0.9, 0.999, 1.0])))
@pytest.mark.parametrize("looked_at_first", [1, 3, 1024])
def test_top_p_keeps_the_likeliest_that_reach_p_and_their_ties(looked_at_first, rows):
    scores, limits, pairs = padded(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "LIKELY_TOKENS", looked_at_first)
        assert kept(keep_top_p(scores, limits)) == [naive_top_p(*pair) for pair in pairs]


def test_top_p_stops_where_p_is_reached_and_not_after():
    scores = torch.tensor([[math.log(2), 0.0, 0.0]])
    assert scores.softmax(dim=-1)[0, 0] == 0.5
    assert kept(keep_top_p(scores, [0.5])) == [{0}]
    assert kept(keep_top_p(scores, [0.5001])) == [{0, 1, 2}]


@settings(max_examples=60)
@given(rows=rows_with(st.sampled_from([0.0, 0.01, 0.2, 0.7, 1.0])))
def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest(rows):
    scores, limits, pairs = padded(rows)
    # A score at the very limit may round to either side.
    assume(all(abs(score - max(row) - math.log(p)) > 1e-5 for row, p in pairs if 0 < p < 1 for score in row))
    assert kept(keep_min_p(scores, limits)) == [naive_min_p(*pair) for pair in pairs]


def test_temperature_zero_takes_the_lowest_of_the_likeliest():
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    assert sample(logits, [Sampler(SamplingParams(), [], 4)] * 2).ids == [1, 0]


@settings(max_examples=20)
@given(batch=st.lists(st.tuples(PARAMS, st.integers(0, 2**31)), min_size=1, max_size=5))
def test_a_sequence_says_the_same_beside_any_neighbours(batch):
    V, steps = 40, 4
    logits = [torch.randn(steps, V, generator=torch.Generator().manual_seed(seed)) for _, seed in batch]

    def say(members):
        samplers = [Sampler(batch[member][0], [member, 3], V) for member in members]
        said = [sample(torch.stack([logits[member][step] for member in members]), samplers) for step in range(steps)]
        return [list(words) for words in zip(*(step.ids for step in said), strict=True)]

    together = say(range(len(batch)))
    assert together == [say([member])[0] for member in range(len(batch))]
    assert together[::-1] == say(range(len(batch))[::-1])


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[math.log(0.5), math.log(0.3), -math.inf, math.log(0.2)]])
    sampler = Sampler(SamplingParams(temperature=1.0, seed=5), [], 4)
    counts = torch.bincount(torch.tensor([sample(logits, [sampler]).ids[0] for _ in range(1500)]), minlength=4)
    assert counts[2] == 0
    # Four standard deviations of the largest share.
    assert counts / 1500 == pytest.approx([0.5, 0.3, 0, 0.2], abs=4 * math.sqrt(0.25 / 1500))


@settings(max_examples=40)
@given(draw=st.sampled_from([0.0, 0.5, 1 - 2**-32]), row=ROW)
@example(draw=0.0, row=[-math.inf, 0.0])
@example(draw=1 - 2**-32, row=[0.0, -math.inf])
def test_no_draw_reaches_a_token_of_probability_zero(draw, row):
    sampler = Sampler(SamplingParams(temperature=1.0), [], len(row))
    sampler.draw = lambda: draw
    (token,) = sample(torch.tensor([row]), [sampler]).ids
    assert row[token] > -math.inf


def test_draws_stay_below_one():
    sampler = Sampler(SamplingParams(seed=0), [], 1)
    draws = [sampler.draw() for _ in range(1000)]
    assert 0 <= min(draws) < 0.01
    assert 0.99 < max(draws) <= 1 - 2**-32


def test_a_temperature_near_zero_is_greedy_and_a_seedless_stream_is_new():
    logits = torch.randn(1, 50)
    near = [Sampler(SamplingParams(temperature=t), [], 50) for t in (1e-6, 1e-44, 1e-300)]
    assert [sample(logits, [sampler]).ids[0] for sampler in near] == [int(logits.argmax())] * 3
    streams = {Sampler(SamplingParams(temperature=1.0), [], 50).draw() for _ in range(3)}
    assert len(streams) == 3


def test_penalties_count_the_prompt_and_the_answer_as_their_definitions_say():
    logits = torch.tensor([2.0, 2.0, -2.0, -2.0, 1.0])
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    sampler = Sampler(params, [0, 2], 5)
    assert sampler.adjust(logits).tolist() == [1.0, 2.0, -4.0, -2.0, 1.0]
    for token_id in (2, 3, 3):
        sampler.record(token_id)
    assert sampler.adjust(logits).tolist() == [1.0, 2.0, -4.75, -5.0, 1.0]


def test_penalties_keep_a_greedy_answer_from_repeating_itself():
    logits = torch.tensor([[1.0, 0.9, 0.8]])
    plain, penalized = (Sampler(SamplingParams(frequency_penalty=p), [], 3) for p in (0.0, 0.15))
    assert [sample(logits, [plain]).ids[0] for _ in range(4)] == [0, 0, 0, 0]
    assert [sample(logits, [penalized]).ids[0] for _ in range(4)] == [0, 1, 0, 2]


def test_a_bias_is_added_after_the_penalties_and_can_forbid_or_demand_a_token():
    logits = torch.tensor([2.0, 1.0, -1.0])
    sampler = Sampler(SamplingParams(logit_bias={0: -1.5, 2: 0.5}, repetition_penalty=2.0), [0], 3)
    assert sampler.adjust(logits).tolist() == [-0.5, 1.0, -0.5]
    assert logits.tolist() == [2.0, 1.0, -1.0]
    demanding = [Sampler(SamplingParams(logit_bias={2: 100}, temperature=t, seed=0), [], 3) for t in (0.0, 1.0)]
    assert sample(logits.expand(2, 3), demanding).ids == [2, 2]
    forbidding = Sampler(SamplingParams(logit_bias={0: -100}, temperature=1.0, seed=0), [], 3)
    assert 0 not in {sample(logits[None], [forbidding]).ids[0] for _ in range(50)}


def test_a_mask_leaves_only_what_it_allows_and_other_rows_alone():
    logits = torch.tensor([[3.0, 2.0, 1.0]] * 3)
    samplers = [Sampler(SamplingParams(temperature=t, seed=0), [], 3) for t in (0.0, 5.0, 0.0)]
    allowed = {0: torch.tensor([False, True, True]), 1: torch.tensor([False, False, True])}
    sampled = sample(logits, samplers, allowed)
    assert sampled.ids == [1, 2, 0]
    assert sampled.logprobs == pytest.approx(logits[0].log_softmax(dim=-1)[[1, 2, 0]].tolist())


def test_the_likeliest_tokens_come_in_order_and_no_more_than_there_are():
    logprobs = torch.tensor([[-1.0, -3.0, -2.0], [-5.0, -4.0, -4.0]])
    assert top_logprobs(logprobs, 2) == [((0, -1.0), (2, -2.0)), ((1, -4.0), (2, -4.0))]
    assert [len(top) for top in top_logprobs(logprobs, 20)] == [3, 3]


def test_logprobs_are_the_models_own():
    logits = torch.randn(2, 30)
    params = SamplingParams(temperature=0.5, top_k=3, repetition_penalty=1.5, logit_bias={4: 9.0}, seed=1)
    sampled = sample(logits, [Sampler(params, random_ids(4).clamp(max=29).tolist(), 30) for _ in range(2)])
    expected = logits.log_softmax(dim=-1)[torch.arange(2), sampled.ids]
    assert sampled.logprobs == pytest.approx(expected.tolist())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_scores_that_are_no_numbers_are_an_error(temperature, broken):
    logits = torch.zeros(2, 8)
    logits[1, 3] = broken
    samplers = [Sampler(SamplingParams(temperature=temperature, top_p=0.9), [], 8) for _ in range(2)]
    sound, damaged = sample(logits, samplers).logprobs
    require_numbers(sound)
    with pytest.raises(CheckpointError, match="a sequence got scores that are not numbers: the weights are damaged"):
        require_numbers(damaged)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -0.1}, r"temperature is -0.1; it must be between 0 \(greedy\) and 100"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -1}, r"top_k is -1; it must be 0 \(no limit\) or above"),
        ({"top_p": 0.0}, r"top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": 1.5}, "min_p is 1.5; it must be between 0"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty is 0.0; it must be above 0 \(1 is none\)"),
        ({"presence_penalty": 3.0}, "presence_penalty is 3.0; it must be between -2 and 2"),
        ({"frequency_penalty": -2.5}, "frequency_penalty is -2.5"),
        ({"seed": -1}, "seed is -1; it must be between 0 and 2"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"stop_ids": (3, -2)}, "a stop id is -2; it must be a token id"),
        ({"logit_bias": {7: 100.5}}, "the logit_bias of token 7 is 100.5; it must be between -100 and 100"),
        ({"logit_bias": {7: math.nan}}, "the logit_bias of token 7 is nan"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(setting, message):
    with pytest.raises(UsageError, match=message):
        SamplingParams(**setting)


@pytest.mark.parametrize("token_id", [-1, 8])
def test_a_bias_on_a_token_that_does_not_exist_is_refused(token_id):
    with pytest.raises(UsageError, match=f"logit_bias names the token id {token_id}; ids are 0..7"):
        Sampler(SamplingParams(logit_bias={token_id: 1.0}), [], 8)
