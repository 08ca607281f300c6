"""What a run's last steps say together: a loss without the noise of single batches, speed, and the experts' balance.

Legend: L layers with experts, E experts.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from yuanmoe.checkpoint.adapters.adapter import active_lora_parameters
from yuanmoe.plan import cost
from yuanmoe.routing.balance import Balance, balance
from yuanmoe.train.recipe.recipe import Recipe
from yuanmoe.train.steps.guard import mean_loss
from yuanmoe.train.steps.loop import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class MeterReading:
    """Of the last steps."""

    loss: float | None
    """Nats a learned token; None where there was none."""
    tokens_per_s: float
    flops_per_s: float
    load: list[list[int]]
    """Choices that fell on each expert, [L][E]."""
    balance: list[Balance]


def flops_per_token(recipe: Recipe) -> float:
    """Of the model alone, forward and backward, as `plan.cost` counts them; a token sees half its window on average."""
    context = (recipe.data.sequence_length + 1) / 2
    if recipe.lora is None:
        return cost.training_flops(recipe.model, context)
    return cost.adapting_flops(recipe.model, active_lora_parameters(recipe.model, recipe.lora), context)


def read(recent: Sequence[Progress], recipe: Recipe) -> MeterReading:
    """What these steps say."""
    rate = len(recent) * recipe.data.tokens_per_step / sum(each.step_s for each in recent)
    layers = zip(*(each.load for each in recent), strict=True)
    load = [[sum(counts) for counts in zip(*layer, strict=True)] for layer in layers]
    losses = [(each.loss, each.learned) for each in recent if each.loss is not None]
    return MeterReading(
        loss=mean_loss(losses) if losses else None,
        tokens_per_s=rate,
        flops_per_s=rate * flops_per_token(recipe),
        load=load,
        balance=[balance(layer) for layer in load],
    )


def metrics(progress: Progress, reading: MeterReading) -> dict[str, Any]:
    """One line of a run's metrics: the step, and what the last steps say together; the load where it was measured."""
    line = {name: value for name, value in asdict(progress).items() if name != "load" and value is not None}
    line |= {"tokens_per_s": reading.tokens_per_s, "flops_per_s": reading.flops_per_s}
    line |= {} if reading.loss is None else {"recent_loss": reading.loss}
    line |= {"balance": [asdict(layer) for layer in reading.balance]}
    return line if progress.milestone is None else line | {"load": reading.load}


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """A loss in nats a token as bits a byte of text, which tokenizers of any size share."""
    return loss / math.log(2) / bytes_per_token
