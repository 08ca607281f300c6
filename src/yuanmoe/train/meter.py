"""What a run's last steps say together: a loss without the noise of single batches, speed, and the experts' balance.

Legend: L layers with experts, E experts.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from yuanmoe.plan import cost
from yuanmoe.train.loop import Progress
from yuanmoe.train.recipe import Recipe

WINDOW_STEPS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """How evenly the experts of one layer work."""

    max_over_mean: float
    """Load of the busiest expert, as a multiple of an even share."""
    effective_experts: float
    """Equally busy experts whose choice would be as uncertain: exp of the load's entropy."""
    dead_experts: int
    """Never chosen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Of the last steps."""

    loss: float
    """Nats a token."""
    tokens_per_s: float
    flops_per_s: float
    load: list[list[int]]
    """Choices that fell on each expert, [L][E]."""
    balance: list[Balance]


class Meter:
    """Reads a run's progress, step by step."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        # A token of a window sees half of it on average.
        self.flops_per_token = cost.training_flops(recipe.model, (recipe.sequence_length + 1) / 2)
        """Of the model alone, forward and backward, as `plan.cost` counts them."""
        self._recent: deque[Progress] = deque(maxlen=WINDOW_STEPS)
        self._tokens, self._seconds = 0, 0.0

    @property
    def tokens_per_s(self) -> float:
        """In all steps so far; measurements on held-out text take time beside them."""
        return self._tokens / self._seconds

    def read(self, progress: Progress) -> Reading:
        """What the run says after `progress`, its next step."""
        self._recent.append(progress)
        self._tokens, self._seconds = progress.tokens, self._seconds + progress.step_s
        steps = len(self._recent)
        rate = steps * self._recipe.tokens_per_step / sum(each.step_s for each in self._recent)
        layers = zip(*(each.load for each in self._recent), strict=True)
        load = [[sum(counts) for counts in zip(*layer, strict=True)] for layer in layers]
        return Reading(
            loss=sum(each.loss for each in self._recent) / steps,
            tokens_per_s=rate,
            flops_per_s=rate * self.flops_per_token,
            load=load,
            balance=[balance(layer) for layer in load],
        )


def balance(load: Sequence[int]) -> Balance:
    """Of a layer whose experts were chosen `load` times each, [E]."""
    total = sum(load)
    shares = [count / total for count in load if count]
    return Balance(
        max_over_mean=max(load) * len(load) / total,
        effective_experts=math.exp(-sum(share * math.log(share) for share in shares)),
        dead_experts=len(load) - len(shares),
    )


def metrics(progress: Progress, reading: Reading) -> dict[str, Any]:
    """One line of a run's metrics: the step, and beside it what the last steps say together."""
    line = {name: value for name, value in asdict(progress).items() if name != "load" and value is not None}
    smooth = {"recent_loss": reading.loss, "tokens_per_s": reading.tokens_per_s, "flops_per_s": reading.flops_per_s}
    return line | smooth | {"balance": [asdict(layer) for layer in reading.balance]}


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """A loss in nats a token as bits a byte of text, which tokenizers of any size share."""
    return loss / math.log(2) / bytes_per_token
