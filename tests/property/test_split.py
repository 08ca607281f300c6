"""Stages of a pipeline against every possible list."""

import itertools
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from yuanmoe.plan.cluster.split import Demand, spans, split

amounts = st.integers(0, 50)


@st.composite
def demands(draw: st.DrawFn, *, equal: bool) -> Demand:
    layers = draw(st.integers(1, 7))
    stages = draw(st.integers(1, layers))

    def several(count: int) -> list[int]:
        return draw(st.lists(amounts, min_size=count, max_size=count))

    def of_layers() -> list[int]:
        return several(1) * layers if equal else several(layers)

    return Demand(
        layer_bytes=of_layers(),
        layer_kept=of_layers(),
        layer_s=of_layers(),
        stage_bytes=several(stages),
        stage_s=several(stages),
        in_flight=range(stages, 0, -1),
    )


def needs(demand: Demand, stages: tuple[int, ...]) -> tuple[float, float]:
    """Bytes of the fullest and seconds of the slowest stage."""
    spanned = [slice(*span) for span in spans(stages)]
    sizes = [
        demand.stage_bytes[p] + sum(demand.layer_bytes[s]) + demand.in_flight[p] * sum(demand.layer_kept[s])
        for p, s in enumerate(spanned)
    ]
    return max(sizes), max(demand.stage_s[p] + sum(demand.layer_s[s]) for p, s in enumerate(spanned))


def every_list(demand: Demand) -> list[tuple[int, ...]]:
    layers = len(demand.layer_s)
    cuts = itertools.combinations(range(1, layers), demand.num_stages - 1)
    return [tuple(b - a for a, b in itertools.pairwise((0, *cut, layers))) for cut in cuts]


@settings(deadline=None, max_examples=150)
@given(demands(equal=True), st.integers(0, 600))
def test_equal_layers_get_the_best_list(demand: Demand, limit: int) -> None:
    found = needs(demand, split(demand, limit))
    every = [needs(demand, stages) for stages in every_list(demand)]
    fitting = [(seconds, size) for size, seconds in every if size <= limit]
    if fitting:
        assert found[::-1] == min(fitting)
    else:
        assert found[0] == min(size for size, _ in every)


@settings(deadline=None, max_examples=100)
@given(demands(equal=False), st.integers(0, 600))
def test_any_layers_get_a_list_that_is_whole(demand: Demand, limit: int) -> None:
    stages = split(demand, limit)
    assert len(stages) == demand.num_stages
    assert min(stages) >= 1
    assert sum(stages) == len(demand.layer_s)
    assert needs(demand, stages)[0] >= min(needs(demand, other)[0] for other in every_list(demand))


def test_the_first_stages_hold_more_micro_batches_and_so_fewer_layers() -> None:
    demand = Demand(
        layer_bytes=[1.0] * 24,
        layer_kept=[1.0] * 24,
        layer_s=[1.0] * 24,
        stage_bytes=[0.0] * 8,
        stage_s=[0.0] * 8,
        in_flight=range(8, 0, -1),
    )
    assert split(demand, math.inf) == (3,) * 8
    tight = split(demand, 20)
    assert tight == tuple(sorted(tight))
    assert needs(demand, tight)[0] <= 20
    assert needs(demand, (3,) * 8)[0] == 27
