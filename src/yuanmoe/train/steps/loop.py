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

from yuanmoe.checkpoint.formats.native_config import parse_dtype
from yuanmoe.data.loader.loader import Batch
from yuanmoe.errors import DataError
from yuanmoe.model.decoder import CausalLM
from yuanmoe.train.parallel.ranks import ALONE, Ranks
from yuanmoe.train.recipe.recipe import Recipe
from yuanmoe.train.state.stored import Stored
from yuanmoe.train.steps import guard
from yuanmoe.train.steps.balance import RouterBiases
from yuanmoe.train.steps.optim import Optimizer
from yuanmoe.train.steps.passes import Passes
from yuanmoe.train.steps.schedule import learning_rate, spent
from yuanmoe.train.steps.step import Learned

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

    The loss on `heldout` is measured at `recipe.run.milestones` even shares of the budget, the last at its end. Of
    several ranks each learns from its share of every batch, in its layers, and all of them come to the same progress.
    """

    def __init__(
        self,
        model: CausalLM,
        recipe: Recipe,
        batch: Callable[[int], Batch],
        heldout: Batch | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model = model.train()
        self.recipe = recipe
        self.ranks = ranks
        self.step = 0
        self.recent: deque[Progress] = deque(maxlen=RECENT_STEPS)
        self._batch, self._heldout = batch, heldout
        self._optimizer = Optimizer(model, recipe.optimizer, ranks, parse_dtype(recipe.run.dtype))
        self._biases = RouterBiases(model, recipe.balance.bias_rate)
        self._passes = Passes(model, ranks)
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
        stages = self.ranks.stages
        self._biases.update(learned.load if stages is None else stages.own_load(learned.load))
        step_s = time.perf_counter() - begin
        self.step += 1
        elapsed_s = self.ranks.first(self.elapsed_s)
        self._share = spent(self.recipe, self.step, elapsed_s)
        milestone = self._milestone()
        progress = Progress(
            step=self.step,
            tokens=self.step * self.recipe.data.tokens_per_step,
            step_s=step_s,
            elapsed_s=elapsed_s,
            share=self._share,
            learning_rate=rate * self.recipe.optimizer.learning_rate,
            loss=learned.loss.item(),
            balance_loss=learned.balance_loss.item(),
            gradient_norm=norm,
            load=[load.tolist() for load in learned.load],
            milestone=milestone,
            heldout_loss=None if milestone is None or self._heldout is None else self.measure(self._heldout),
        )
        self.recent.append(progress)
        return progress

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that the next step depends on besides the model's own, each on one rank alone."""
        return self._optimizer.tensors() | ({} if self.ranks.data_index else self._biases.tensors())

    def measure(self, batch: Batch) -> float:
        """Mean loss of the windows of `batch` now, in nats a learned token; all ranks take part."""
        return self._passes.measure(batch)

    def facts(self) -> dict[str, Any]:
        """Everything else that it depends on, as JSON values."""
        return {
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "heldout_loss": self.recent[-1].heldout_loss if self.recent else None,
            "recent": [asdict(progress) for progress in self.recent],
        }

    def load(self, tensors: Stored, facts: Mapping[str, Any]) -> None:
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
        recipe, batch = self.recipe, self._whole_batch()
        with _randomness([recipe.run.seed, self.step, self.ranks.rank], self._passes.device):
            learned = self._passes.learn(batch, recipe.data.windows_at_once, recipe.balance)
        norm = self._optimizer.clip(recipe.optimizer.gradient_clip).item()
        losses = [progress.loss for progress in self.recent]
        if what := guard.fault(learned.loss.item(), norm, losses, recipe.run.spike):
            self._optimizer.zero_grad()
            raise guard.failure(self.step + 1, self.step, what, norm, self._passes.window_losses(batch))
        return learned, norm

    def _whole_batch(self) -> Batch:
        """The windows of all ranks."""
        batch, vocab_size = self._batch(self.step), self.recipe.model.vocab_size
        if batch.ids.min() < 0 or batch.ids.max() >= vocab_size:
            raise DataError(
                f"batch {self.step} holds token ids {batch.ids.min()} to {batch.ids.max()}, the model's vocabulary "
                f"ends at {vocab_size - 1}; pack the text with the model's tokenizer"
            )
        return batch

    def _milestone(self) -> int | None:
        """The milestone that the share of the budget has just reached, from 1."""
        due = int(self._share * self.recipe.run.milestones)
        reached = due if due > self._milestones else None
        self._milestones = due
        return reached


@contextmanager
def _randomness(seeds: list[int], device: torch.device) -> Iterator[None]:
    """What is random inside depends on these numbers alone, and leaves torch's generators as they were."""
    # Zeros at the end change nothing: the first rank draws what a single process draws.
    mixed = int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0])
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(mixed >> 1)
        yield
