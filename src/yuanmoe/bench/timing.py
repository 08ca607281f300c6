"""Honest timings: contenders take turns in one run, and every figure is a median with its spread."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of one call over several runs."""

    median_s: float
    min_s: float
    max_s: float
    runs: int

    def rate(self, amount: float) -> dict[str, float]:
        """`amount` a second at the median, and at the slowest and fastest run."""
        return {"median": amount / self.median_s, "min": amount / self.max_s, "max": amount / self.min_s}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def take_turns(
    contenders: Mapping[str, Callable[[], object]], runs: int, on_run: Callable[[str, float], None] | None = None
) -> dict[str, Timing]:
    """Times the contenders in turn, A B A B, after one uncounted call of each, so that drift hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(runs + 1):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            elapsed = time.perf_counter() - start
            if turn:
                seconds[name].append(elapsed)
            if on_run:
                on_run(name, elapsed)
    return {
        name: Timing(median_s=median(taken), min_s=min(taken), max_s=max(taken), runs=runs)
        for name, taken in seconds.items()
    }
