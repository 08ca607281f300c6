"""Schedules of pipelines, whatever the numbers: order, what is in flight, and that messages never wait in a circle."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from small_models import configs, small_config
from yuanmoe.errors import UsageError
from yuanmoe.plan.cluster.layout import balanced_stages, check_stages
from yuanmoe.presets import preset
from yuanmoe.train.parallel.pipeline import passes

SCHEDULES = st.sampled_from(["1f1b", "gpipe"])
STAGES, MICRO_BATCHES = st.integers(1, 7), st.integers(1, 12)


@given(SCHEDULES, STAGES, MICRO_BATCHES)
def test_every_stage_does_every_pass_once_and_holds_what_it_may(schedule, num_stages, micro_batches):
    for stage in range(num_stages):
        flying, most, done = set(), 0, []
        for kind, number in passes(schedule, stage, num_stages, micro_batches):
            if kind == "forward":
                flying.add(number)
            else:
                flying.remove(number)
            most = max(most, len(flying))
            done.append((kind, number))
        assert not flying
        assert sorted(done) == sorted((kind, n) for kind in ("forward", "backward") for n in range(micro_batches))
        allowed = micro_batches if schedule == "gpipe" else min(micro_batches, num_stages - stage)
        assert most == allowed


def batches_of(schedule, stage, num_stages, micro_batches):
    """The messages that a stage posts together and waits for, as `Mail` does: ("to" or "from", stage)."""
    leaving, posted = [], []
    for kind, _ in passes(schedule, stage, num_stages, micro_batches):
        source, target = (stage - 1, stage + 1) if kind == "forward" else (stage + 1, stage - 1)
        if 0 <= source < num_stages:
            posted.append([*leaving, ("from", source)])
            leaving = []
        if 0 <= target < num_stages:
            leaving.append(("to", target))
    return [*posted, leaving]


@given(SCHEDULES, STAGES, MICRO_BATCHES)
def test_no_two_stages_wait_for_each_other(schedule, num_stages, micro_batches):
    """Messages meet in order, and no stage goes on before all of a batch have met."""
    todo = [batches_of(schedule, stage, num_stages, micro_batches) for stage in range(num_stages)]
    open_now = [[] for _ in todo]
    while any(todo) or any(open_now):
        moved = False
        for stage, batch in enumerate(open_now):
            if not batch and todo[stage]:
                open_now[stage] = list(todo[stage].pop(0))
                moved = True
        for stage, batch in enumerate(open_now):
            for message in list(batch):
                way, other = message
                answer = ("from" if way == "to" else "to", stage)
                if answer in open_now[other]:
                    batch.remove(message)
                    open_now[other].remove(answer)
                    moved = True
        assert moved, open_now


@given(configs(), st.data())
def test_balanced_stages_are_stages(config, data):
    count = data.draw(st.integers(1, config.num_hidden_layers))
    stages = balanced_stages(config, count)
    assert len(stages) == count
    check_stages(stages, config, count)


def test_balanced_stages_of_24_equal_layers_are_the_published_ones():
    """arXiv 2311.15786 section 3: with these M32's head takes as long as two layers, and early stages hold less."""
    assert balanced_stages(preset("m32"), 8) == (2, 2, 3, 3, 4, 4, 4, 2)
    with pytest.raises(UsageError, match="3 pipeline stages cannot share 2 layers; there can be 1 to 2"):
        balanced_stages(small_config(), 3)
