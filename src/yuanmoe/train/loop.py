"""The training loop: steps until the budget is spent, each reported when it is done.

It is an iterator, so whoever asks for the next step owns the display, the files and the decision to stop. With a budget
in tokens, one thread and one seed a run repeats bit for bit; a budget in seconds makes the schedule follow the clock.
Legend: L layers with experts, E experts.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from yuanmoe.data.loader import Windows
from yuanmoe.model.decoder import YuanForCausalLM
from yuanmoe.train.optim import learning_rate, make_optimizer, set_learning_rate
from yuanmoe.train.recipe import Recipe
from yuanmoe.train.step import evaluate, train_step


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A run after one of its steps. Losses are nats a token."""

    step: int
    """Steps done."""
    tokens: int
    """Tokens learned from."""
    step_s: float
    """Of this step alone."""
    elapsed_s: float
    """Since the run began, measurements included."""
    share: float
    """Of the budget, from 0 to 1."""
    learning_rate: float
    loss: float
    """Of this step's windows, before they were learned from."""
    gradient_norm: float
    """Before clipping."""
    load: list[list[int]]
    """How many choices of this step's tokens fell on each expert, [L][E]."""
    heldout_loss: float | None
    """Where it was measured after this step."""


def train(
    model: YuanForCausalLM, recipe: Recipe, batch: Callable[[int], Windows], heldout: Windows | None = None
) -> Iterator[Progress]:
    """Trains `model` in place on `batch(0)`, `batch(1)` and so on, one step for each item asked for.

    The loss on `heldout` is measured `recipe.measurements` times, at even shares of the budget, the last at its end.
    """
    device = model.head_weight.device
    optimizer = make_optimizer(model, recipe)
    model.train()
    start = time.perf_counter()
    step, share, measured = 0, 0.0, 0
    while share < 1:
        rate = learning_rate(recipe, share)
        set_learning_rate(optimizer, rate)
        begin = time.perf_counter()
        done = train_step(model, optimizer, _to(batch(step), device), recipe.gradient_clip)
        step_s = time.perf_counter() - begin
        step += 1
        share = spent(recipe, step, time.perf_counter() - start)
        due = int(share * recipe.measurements)
        loss = evaluate(model, _to(heldout, device)) if heldout is not None and due > measured else None
        measured = due
        yield Progress(
            step=step,
            tokens=step * recipe.tokens_per_step,
            step_s=step_s,
            elapsed_s=time.perf_counter() - start,
            share=share,
            learning_rate=rate,
            loss=done.loss,
            gradient_norm=done.gradient_norm,
            load=[load.tolist() for load in done.load],
            heldout_loss=loss,
        )


def spent(recipe: Recipe, step: int, elapsed_s: float) -> float:
    """The share of the budget that is gone, from 0 to 1."""
    tokens = 0.0 if recipe.max_tokens is None else step * recipe.tokens_per_step / recipe.max_tokens
    seconds = 0.0 if recipe.max_seconds is None else elapsed_s / recipe.max_seconds
    return min(1.0, max(tokens, seconds))


def _to(windows: Windows, device: torch.device) -> Tensor:
    return torch.from_numpy(windows).to(device)
