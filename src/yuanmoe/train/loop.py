"""A training run as an object: steps until the budget is spent, each reported when it is done, a state between them.

It is an iterator, so whoever asks for the next step owns the display, the files and the decision to stop. Everything
random in a step follows from the seed and the step's number, and a batch from its number: there is no generator whose
state could be lost. With a budget in tokens, one thread and one seed a run repeats bit for bit, interrupted or not.
Legend: L layers with experts, E experts.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from yuanmoe.data.loader import Batch
from yuanmoe.errors import DataError
from yuanmoe.model.decoder import YuanForCausalLM
from yuanmoe.train import guard
from yuanmoe.train.balance import RouterBiases
from yuanmoe.train.optim import Optimizer
from yuanmoe.train.recipe import Recipe
from yuanmoe.train.schedule import learning_rate, spent
from yuanmoe.train.step import Learned, Windows, evaluate, learn, window_losses

RECENT_STEPS = 32
"""Steps that are remembered, for what they say together (`meter`) and to tell a spike (`guard`)."""


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
    balance_loss: float
    """What the balance of experts added to the loss."""
    gradient_norm: float
    """Before clipping."""
    load: list[list[int]]
    """How many choices of this step's tokens fell on each expert, [L][E]."""
    milestone: int | None
    """The number of the milestone that this step reached."""
    heldout_loss: float | None
    """Where it was measured after this step."""


class Training:
    """One run of a model, trained in place on `batch(0)`, `batch(1)` and so on.

    The loss on `heldout` is measured at `recipe.run.milestones` even shares of the budget, the last at its end.
    """

    def __init__(
        self,
        model: YuanForCausalLM,
        recipe: Recipe,
        batch: Callable[[int], Batch],
        heldout: Batch | None = None,
    ) -> None:
        self.model = model.train()
        self.recipe = recipe
        self.step = 0
        self.recent: deque[Progress] = deque(maxlen=RECENT_STEPS)
        self._batch, self._heldout = batch, heldout
        self._optimizer = Optimizer(model, recipe.optimizer)
        self._biases = RouterBiases(model, recipe.balance.bias_rate)
        self._share, self._milestones = 0.0, 0
        self._began = time.perf_counter()

    def __iter__(self) -> Iterator[Progress]:
        while self._share < 1:
            yield self.advance()

    @property
    def elapsed_s(self) -> float:
        """Since the run began, without the time between an interruption and its resumption."""
        return time.perf_counter() - self._began

    def advance(self) -> Progress:
        """One step. Raises TrainingError, and leaves everything as it was, where it would do harm."""
        begin = time.perf_counter()
        rate = learning_rate(self.recipe.schedule, self._share)
        learned, norm = self._learn()
        self._optimizer.step(rate)
        self._optimizer.zero_grad()
        self._biases.update(learned.load)
        step_s = time.perf_counter() - begin
        self.step += 1
        self._share = spent(self.recipe, self.step, self.elapsed_s)
        milestone = self._milestone()
        progress = Progress(
            step=self.step,
            tokens=self.step * self.recipe.data.tokens_per_step,
            step_s=step_s,
            elapsed_s=self.elapsed_s,
            share=self._share,
            learning_rate=rate * self.recipe.optimizer.learning_rate,
            loss=learned.loss.item(),
            balance_loss=learned.balance_loss.item(),
            gradient_norm=norm,
            load=[load.tolist() for load in learned.load],
            milestone=milestone,
            heldout_loss=None if milestone is None else self._measure(),
        )
        self.recent.append(progress)
        return progress

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that the next step depends on besides the model's own."""
        return self._optimizer.tensors() | self._biases.tensors()

    def facts(self) -> dict[str, Any]:
        """Everything else that it depends on, as JSON values."""
        return {
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "heldout_loss": self.recent[-1].heldout_loss if self.recent else None,
            "recent": [asdict(progress) for progress in self.recent],
        }

    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Goes on from where `tensors` and `facts` were taken; the model has its weights of then already."""
        self.step = facts["step"]
        self._began = time.perf_counter() - facts["elapsed_s"]
        self._share = spent(self.recipe, self.step, facts["elapsed_s"])
        self._milestones = int(self._share * self.recipe.run.milestones)
        self.recent.extend(Progress(**progress) for progress in facts["recent"])
        self._optimizer.load(tensors, self.step)
        self._biases.load(tensors)

    def _learn(self) -> tuple[Learned, float]:
        """The gradient of the next batch, clipped, and its norm before that."""
        recipe, windows = self.recipe, self._windows()
        with _randomness(recipe.run.seed, self.step, windows.ids.device):
            learned = learn(self.model, windows, recipe.data.windows_at_once, recipe.balance)
        norm = self._optimizer.clip(recipe.optimizer.gradient_clip).item()
        losses = [progress.loss for progress in self.recent]
        if what := guard.fault(learned.loss.item(), norm, losses, recipe.run.spike):
            self._optimizer.zero_grad()
            raise guard.failure(self.step + 1, self.step, what, norm, window_losses(self.model, windows))
        return learned, norm

    def _windows(self) -> Windows:
        batch, vocab_size = self._batch(self.step), self.recipe.model.vocab_size
        if batch.ids.min() < 0 or batch.ids.max() >= vocab_size:
            raise DataError(
                f"batch {self.step} holds token ids {batch.ids.min()} to {batch.ids.max()}, the model's vocabulary "
                f"ends at {vocab_size - 1}; pack the text with the model's tokenizer"
            )
        return Windows.of(batch, self.model.model.norm.weight.device)

    def _milestone(self) -> int | None:
        """The milestone that the share of the budget has just reached, from 1."""
        due = int(self._share * self.recipe.run.milestones)
        reached = due if due > self._milestones else None
        self._milestones = due
        return reached

    def _measure(self) -> float | None:
        if self._heldout is None:
            return None
        return evaluate(self.model, Windows.of(self._heldout, self.model.model.norm.weight.device))


@contextmanager
def _randomness(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """What is random inside depends on the seed and the step alone, and leaves torch's generators as they were."""
    mixed = int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0])
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(mixed >> 1)
        yield
