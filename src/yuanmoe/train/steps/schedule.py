"""How far a run is, and its learning rate there (spec 6.2; WSD: arXiv 2404.06395, its end a line).

All shares are of the budget, from 0 to 1, so that a budget in seconds and one in tokens have one schedule.
"""

import math

from yuanmoe.train.recipe.recipe import Recipe, ScheduleSettings


def spent(recipe: Recipe, tokens: int, elapsed_s: float) -> float:
    """The share of the budget that is gone after so many tokens and seconds."""
    budget = recipe.schedule
    by_tokens = 0.0 if budget.max_tokens is None else tokens / budget.max_tokens
    by_seconds = 0.0 if budget.max_seconds is None else elapsed_s / budget.max_seconds
    return min(1.0, max(by_tokens, by_seconds))


def learning_rate(schedule: ScheduleSettings, share: float, step: float = 0.0) -> float:
    """The learning rate after a share of the budget, as a share of its highest.

    The warm-up counts the share that the coming `step` takes as well: a first step at rate 0 would learn nothing.
    """
    if share < schedule.warmup:
        return min(1.0, (share + step) / schedule.warmup)
    return schedule.final_learning_rate + (1 - schedule.final_learning_rate) * _above_final(schedule, share)


def _above_final(schedule: ScheduleSettings, share: float) -> float:
    """From 1 at the highest rate to 0 at the final one."""
    if schedule.shape == "cosine":
        rest = 1 - schedule.warmup
        return 0.5 * (1 + math.cos(math.pi * (share - schedule.warmup) / rest)) if rest else 1.0
    if schedule.shape == "wsd" and schedule.decay:
        return min(1.0, (1 - share) / schedule.decay)
    return 1.0
