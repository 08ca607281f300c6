"""How many consecutive layers each pipeline stage gets: the fastest that fits, then the one that needs least memory.

Under 1F1B a step lasts as long as its slowest stage, early stages hold more micro-batches, and the embedding and the
head weigh on the first and the last: so equal stages are rarely best (arXiv 2311.15786 section 3). Pure numbers; what
layers are and take is known in `parts.py`.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

ROUNDS = 30
"""Halvings of a range in search of a limit: to a billionth of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What each layer needs, in order, and what each stage needs besides its layers."""

    layer_bytes: Sequence[float]
    """Whatever happens."""
    layer_kept: Sequence[float]
    """Bytes for each micro-batch in flight."""
    layer_s: Sequence[float]
    """Seconds of a micro-batch."""
    stage_bytes: Sequence[float]
    stage_s: Sequence[float]
    in_flight: Sequence[int]
    """Micro-batches that a stage holds at most."""

    @property
    def num_stages(self) -> int:
        return len(self.in_flight)


def spans(stages: Sequence[int]) -> list[tuple[int, int]]:
    """First layer and end of each stage."""
    return list(itertools.pairwise(itertools.accumulate(stages, initial=0)))


def possible(demand: Demand, limit_bytes: float) -> bool:
    """Whether some list keeps every stage within the limit."""
    return _fill(demand, limit_bytes, math.inf) is not None


def split(demand: Demand, limit_bytes: float) -> tuple[int, ...]:
    """Layers of each stage: the fastest within the limit, of those the least full; the least full if nothing fits.

    Exact for equal layers. Layers that differ may hide a slightly better list, because each stage takes all it can.
    """
    limit_s = math.inf
    if possible(demand, limit_bytes):
        limit_s = _lowest(_most_s(demand), lambda seconds: _fill(demand, limit_bytes, seconds) is not None)
    else:
        limit_bytes = _most_bytes(demand)
    limit_bytes = _lowest(limit_bytes, lambda size: _fill(demand, size, limit_s) is not None)
    stages = _fill(demand, limit_bytes, limit_s)
    assert stages is not None, "the limits are such that stages were found within them"
    return stages


# No stage of any list exceeds these, however the sums round.


def _most_s(demand: Demand) -> float:
    return 2 * (max(demand.stage_s) + sum(demand.layer_s))


def _most_bytes(demand: Demand) -> float:
    kept = max(demand.in_flight) * sum(demand.layer_kept)
    return 2 * (max(demand.stage_bytes) + sum(demand.layer_bytes) + kept)


def _lowest(most: float, enough: Callable[[float], bool]) -> float:
    """The lowest limit that is enough, up to `most`, which is."""
    low, high = 0.0, most
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _fill(demand: Demand, limit_bytes: float, limit_s: float) -> tuple[int, ...] | None:
    """Stages within both limits, each as long as it can be and leaves a layer for those behind; None if none are."""
    stages, first, num_layers = [], 0, len(demand.layer_s)
    for stage in range(demand.num_stages):
        size, seconds = demand.stage_bytes[stage], demand.stage_s[stage]
        end = first
        for layer in range(first, num_layers - (demand.num_stages - stage - 1)):
            size += demand.layer_bytes[layer] + demand.in_flight[stage] * demand.layer_kept[layer]
            seconds += demand.layer_s[layer]
            if size > limit_bytes or seconds > limit_s:
                break
            end = layer + 1
        if end == first:
            return None
        stages.append(end - first)
        first = end
    return tuple(stages) if first == num_layers else None
