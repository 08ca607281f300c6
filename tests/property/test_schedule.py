"""The schedule over pages that only remember tokens: everyone reads their own, nothing leaks, everyone has a turn.

The model is played by a list of slots for each page; what a sequence would attend to must be its own tokens.
"""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yuanmoe.engine.pages import ROOT, Pages
from yuanmoe.engine.requests import PromptLogprobs, Request
from yuanmoe.engine.sampling import Sampler, SamplingParams
from yuanmoe.engine.schedule import Schedule, Sequence

SAMPLER = Sampler(SamplingParams(), [], 8)


def new_sequence(number: int, prompt: list[int], new_tokens: int, page_size: int, scored: bool = False) -> Sequence:
    length = len(prompt) + new_tokens
    return Sequence(
        request_id=number,
        request=Request(prompt_ids=prompt),
        sampler=SAMPLER,
        ids=list(prompt),
        num_prompt=len(prompt),
        max_length=length,
        table=np.zeros(-(-length // page_size), dtype=np.int32),
        prompt=PromptLogprobs([], []) if scored else None,
    )


class Slots:
    """What a model would have written: the token of each slot of each page."""

    def __init__(self, schedule: Schedule) -> None:
        self._P = schedule.page_size
        self._pages = [[None] * self._P for _ in range(schedule.pages.num_pages)]

    def run(self, batch: list[tuple[Sequence, int]]) -> None:
        """Every sequence writes its new tokens, then reads all of its own."""
        written = [
            (int(sequence.table[place // self._P]), place % self._P)
            for sequence, count in batch
            for place in range(sequence.computed, sequence.computed + count)
        ]
        assert len(set(written)) == len(written), "two sequences write into one slot"
        tokens = [token for s, count in batch for token in s.ids[s.computed : s.computed + count]]
        for (page, slot), token in zip(written, tokens, strict=True):
            self._pages[page][slot] = token
        for sequence, count in batch:
            held = [token for page in sequence.table[: sequence.num_pages] for token in self._pages[page]]
            read = sequence.computed + count
            assert held[:read] == sequence.ids[:read]
            if sequence.prompt is not None:
                sequence.prompt.logprobs.extend(sequence.ids[sequence.computed + 1 : read + 1])


def check(schedule: Schedule, batch: list[tuple[Sequence, int]]) -> None:
    assert sum(count for _, count in batch) <= schedule.step_tokens
    assert len(schedule.running) <= schedule.max_batch_size
    assert all(1 <= count <= sequence.missing for sequence, count in batch)
    arrivals = [sequence.request_id for sequence in (*schedule.running, *schedule.waiting)]
    assert arrivals == sorted(arrivals)
    used = {int(page) for sequence in schedule.running for page in sequence.table[: sequence.num_pages]}
    assert schedule.pages.num_free == schedule.pages.num_pages - len(used)
    assert all(sequence.num_pages == 0 for sequence in schedule.waiting)


def play(schedule: Schedule, arrivals: list[Sequence], rng: random.Random, leave: float) -> dict[int, int]:
    """Runs until nobody is left; some leave early. In which pass each that was not cut short had its first token."""
    slots = Slots(schedule)
    first: dict[int, int] = {}
    passes = 0
    arrivals = arrivals[::-1]
    while arrivals or schedule.waiting or schedule.running:
        while arrivals and rng.random() < 0.6:
            schedule.waiting.append(arrivals.pop())
        for sequence in [*schedule.running, *schedule.waiting]:
            if rng.random() < leave:
                schedule.remove(sequence)
        batch = schedule.plan()
        assert batch or not schedule.running
        check(schedule, batch)
        slots.run(batch)
        schedule.advance(batch)
        passes += 1
        for sequence, _ in batch:
            if not sequence.missing:
                first.setdefault(sequence.request_id, passes)
                if sequence.prompt is not None:
                    assert sequence.prompt.logprobs == sequence.ids[1:]
                    sequence.prompt = None
                sequence.ids.append(rng.randrange(2))
                if len(sequence.ids) == sequence.max_length:
                    schedule.remove(sequence)
    return first


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    page_size=st.integers(1, 8),
    max_batch_size=st.integers(1, 8),
    spare_tokens=st.integers(0, 30),
    spare_pages=st.integers(0, 20),
    leave=st.sampled_from([0.0, 0.03]),
)
def test_thousands_of_requests_leak_nothing_and_read_only_their_own(
    seed, page_size, max_batch_size, spare_tokens, spare_pages, leave
):
    rng = random.Random(seed)
    longest = 40
    pages = Pages(-(-longest // page_size) + spare_pages)
    schedule = Schedule(pages, page_size, max_batch_size, max_batch_size + spare_tokens)
    # Two tokens and few beginnings, so that prompts and answers share pages by chance as well as by design.
    beginnings = [[rng.randrange(2) for _ in range(rng.randrange(20))] for _ in range(3)]
    arrivals = [
        new_sequence(
            number,
            rng.choice(beginnings) + [rng.randrange(2) for _ in range(rng.randint(1, 10))],
            rng.randint(1, 10),
            page_size,
            scored=rng.random() < 0.1,
        )
        for number in range(100)
    ]
    first = play(schedule, arrivals, rng, leave)
    assert pages.num_free == pages.num_pages
    if not leave:
        assert len(first) == len(arrivals)


def test_nobody_starves_while_new_requests_keep_coming():
    schedule = Schedule(Pages(64), 4, 4, 8)
    rng = random.Random(0)
    slots, waits, born = Slots(schedule), [], {}
    for number in range(300):
        size = 60 if number % 10 == 0 else 3
        schedule.waiting.append(new_sequence(number, [rng.randrange(2) for _ in range(size)], 4, 4))
        born[number] = number
        batch = schedule.plan()
        slots.run(batch)
        schedule.advance(batch)
        for sequence, _ in batch:
            if not sequence.missing:
                if len(sequence.ids) == sequence.num_prompt:
                    waits.append(sequence.request_id)
                sequence.ids.append(rng.randrange(2))
                if len(sequence.ids) == sequence.max_length:
                    schedule.remove(sequence)
    served = sorted(waits)
    # In the order of arrival: at any time only the few that run are unserved among the older ones.
    assert set(range(max(served) - schedule.max_batch_size)) <= set(served)
    assert any(number % 10 == 0 for number in served)


def test_the_youngest_gives_way_and_the_oldest_never_does():
    schedule = Schedule(Pages(5), 2, 3, 30)
    old, young = (new_sequence(number, [number] * 3, 5, 2) for number in range(2))
    schedule.waiting.extend([old, young])
    while len(old.ids) < old.max_length:
        batch = schedule.plan()
        assert batch[0][0] is old
        schedule.advance(batch)
        for sequence, _ in batch:
            if not sequence.missing:
                sequence.ids.append(5)
    assert schedule.preemptions == 1
    assert list(schedule.waiting) == [young]


def test_who_gives_way_while_its_prompt_is_scored_starts_the_scores_anew():
    schedule = Schedule(Pages(8), 2, 2, 2)
    slots = Slots(schedule)
    old, young = new_sequence(0, [1, 1], 14, 2), new_sequence(1, [2] * 9, 2, 2, scored=True)
    schedule.waiting.extend([old, young])
    while not schedule.preemptions:
        batch = schedule.plan()
        slots.run(batch)
        schedule.advance(batch)
        old.ids.append(1)
    # It had read some, and its pages are gone to the older one.
    assert 2 < len(old.ids) < old.max_length
    assert (young.computed, young.num_pages, young.prompt) == (0, 0, ([], []))


def test_prompts_that_arrive_together_are_computed_once():
    schedule = Schedule(Pages(64), 4, 8, 100)
    same = [new_sequence(number, list(range(18)), 2, 4) for number in range(5)]
    longer = new_sequence(5, [*range(12), 9, 9, 9, 9, 9], 2, 4)
    schedule.waiting.extend([*same, longer])
    batch = schedule.plan()
    assert batch == [(same[0], 18)]
    schedule.advance(batch)
    same[0].ids.append(1)
    assert schedule.plan() == [(same[0], 1), *((sequence, 2) for sequence in same[1:]), (longer, 5)]
    assert schedule.reused_tokens == 4 * 16 + 12


def test_a_prompt_is_never_reused_whole():
    schedule = Schedule(Pages(16), 4, 8, 100)
    for number in range(3):
        schedule.waiting.append(new_sequence(number, list(range(8)), 1, 4))
        batch = schedule.plan()
        assert [count for _, count in batch] == [8 if number == 0 else 4]
        schedule.advance(batch)
        schedule.remove(batch[0][0])


def test_a_prompt_to_be_scored_reuses_nothing():
    schedule = Schedule(Pages(16), 4, 8, 100)
    for number in range(2):
        schedule.waiting.append(new_sequence(number, list(range(9)), 1, 4, scored=True))
        batch = schedule.plan()
        assert [count for _, count in batch] == [9]
        schedule.advance(batch)
        schedule.remove(batch[0][0])
    assert schedule.pages.num_unused == 2


def test_a_kept_page_goes_after_those_that_continue_it():
    pages = Pages(3)
    taken = [pages.take() for _ in range(3)]
    prefix = ROOT
    for place, page in enumerate(taken):
        kept, prefix = pages.keep(page, prefix, (place,))
        assert kept == page
    pages.release(taken)
    assert (pages.num_free, pages.num_unused) == (3, 3)
    assert [pages.take() for _ in range(2)] == taken[:0:-1]
    assert pages.find(ROOT, (0,)) == taken[0]


def test_what_is_computed_twice_is_kept_once():
    pages = Pages(2)
    one, other = pages.take(), pages.take()
    kept, prefix = pages.keep(one, ROOT, (7,))
    assert pages.keep(other, ROOT, (7,)) == (kept, prefix) == (one, pages.prefix(one))
    assert pages.num_free == 1
    pages.release([one])
    pages.release([one])
    with pytest.raises(AssertionError, match="given back twice"):
        pages.release([one])
