"""When a run must not go on: a loss or a gradient that is no number, or a loss far above those before it.

It is asked before a step moves anything, so that what is saved then is good. A measurement after a step that is
not finite ends the run too, and nothing is saved then.
"""

import math
from collections.abc import Sequence

from yuanmoe.errors import TrainingError

CALM_STEPS = 16
"""Losses that say what is normal; before so many nothing is a spike."""
NAMED_WINDOWS = 4


def fault(loss: float, gradient_norm: float, recent: Sequence[tuple[float, int]], spike: float | None) -> str:
    """What is wrong with a step, in words; empty where nothing is.

    `recent` are the losses of the steps before it, each with the number of its learned tokens, which is its weight.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(gradient_norm):
        return "the gradient is not finite"
    if spike is not None and len(recent) >= CALM_STEPS and loss > (mean := mean_loss(recent)) + spike:
        return f"the loss is {loss:.3f}, more than {spike} above the mean of the last steps, {mean:.3f}"
    return ""


def mean_loss(recent: Sequence[tuple[float, int]]) -> float:
    """The loss of a learned token in steps of these losses and numbers of learned tokens, of which there are some."""
    return math.fsum(loss * learned for loss, learned in recent) / sum(learned for _, learned in recent)


def spoiled(step: int, what: str) -> TrainingError:
    """The error for weights that a step has spoiled; they are not saved."""
    return TrainingError(
        f"after step {step} {what}; the weights are spoiled and not saved: go on from a checkpoint before it with a "
        "lower optimizer.learning_rate or another run.seed"
    )


def failure(step: int, batch: int, what: str, gradient_norm: float, losses: Sequence[float]) -> TrainingError:
    """The error for a step that was not taken; `losses` are those of the single windows of its batch."""
    by_loss = sorted(range(len(losses)), key=lambda row: -math.inf if math.isnan(losses[row]) else -losses[row])
    worst = ", ".join(f"{row} (loss {losses[row]:.3f})" for row in by_loss[:NAMED_WINDOWS])
    return TrainingError(
        f"step {step}: {what}; gradient norm {gradient_norm:.3g}; batch {batch}, where the windows with the highest "
        f"loss are {worst}. The step was not taken: go on with a lower optimizer.learning_rate or another run.seed, or "
        "with run.spike=none if the text is to blame"
    )
