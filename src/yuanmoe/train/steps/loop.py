"""A training run as an object: steps until the budget is spent, each reported when it is done, a state between them.

It is an iterator, so whoever asks for the next step owns the display, the files and the decision to stop. Everything
random in a step follows from the seed and the step's number, and a batch from its number: there is no generator whose
state could be lost. With a budget in tokens, one thread and one seed a run repeats bit for bit, interrupted or not.
Legend: L layers with experts, E experts.
"""

import math
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
from yuanmoe.train.steps.step import Learned, StepSize

RECENT_STEPS = 32
"""Steps that are remembered, for what they say together (`meter`) and to tell a spike (`guard`)."""
FIRST_SHARE = 1e-3
"""Of a budget in seconds, what a first step is taken to need: nobody knows before it is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A run after one of its steps. Losses are nats a token."""

    step: int
    """Steps done."""
    tokens: int
    """Tokens of all windows so far, whatever their size was."""
    learned: int
    """Learned tokens of this step: those that its loss is the mean over."""
    step_s: float
    """Of this step alone."""
    elapsed_s: float
    """Since the run began, measurements included."""
    share: float
    """Of the budget, from 0 to 1."""
    learning_rate: float
    loss: float | None
    """Of this step's windows, before they were learned from; None where they have no learned token."""
    balance_loss: float
    """What the balance of experts added to the loss."""
    gradient_norm: float
    """Before clipping."""
    load: list[list[int]]
    """How many choices of this step's tokens fell on each expert, [L][E]."""
    milestone: int | None
    """The number of the milestone that this step reached."""
    heldout_loss: float | None
    """Where it was measured after this step, and the held-out text has learned tokens."""


class Training:
    """One run of a model, trained in place on the windows `batch(n)` gives from its sample `n` on.

    Steps take one batch after the other, so that a run that goes on with larger or smaller batches begins with the
    sample after the last one that was read. The loss on `heldout` is measured at `recipe.run.milestones` even shares of
    the budget, the last at its end. Of several ranks each learns from its share of every batch, in its layers, and all
    of them come to the same progress.
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
        self.step = self.samples = self.tokens = 0
        self.is_sound = True
        """Whether nothing was found in the weights that must not be saved."""
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
        rate = learning_rate(self.recipe.schedule, self._share, self._next_share())
        batch = self._whole_batch()
        learned, norm = self._learn(batch)
        num_learned = StepSize.of(batch).learned
        self._optimizer.step(rate)
        self._optimizer.zero_grad()
        stages = self.ranks.stages
        self._biases.update(learned.load if stages is None else stages.own_load(learned.load))
        step_s = time.perf_counter() - begin
        self.step += 1
        self.samples += self.recipe.data.batch_size
        self.tokens += self.recipe.data.tokens_per_step
        elapsed_s = self.ranks.first(self.elapsed_s)
        self._share = spent(self.recipe, self.tokens, elapsed_s)
        milestone = self._milestone()
        progress = Progress(
            step=self.step,
            tokens=self.tokens,
            learned=num_learned,
            step_s=step_s,
            elapsed_s=elapsed_s,
            share=self._share,
            learning_rate=rate * self.recipe.optimizer.learning_rate,
            loss=learned.loss.item() if num_learned else None,
            balance_loss=learned.balance_loss.item(),
            gradient_norm=norm,
            load=[load.tolist() for load in learned.load],
            milestone=milestone,
            heldout_loss=None if milestone is None else self._measured(),
        )
        self.recent.append(progress)
        return progress

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that the next step depends on besides the model's own, each on one rank alone."""
        return self._optimizer.tensors() | ({} if self.ranks.data_index else self._biases.tensors())

    def measure(self, batch: Batch) -> float | None:
        """Mean loss of the windows of `batch` now, in nats a learned token; None where there is none.

        All ranks take part. Raises TrainingError where it is not finite: the weights are spoiled then.
        """
        loss = self._passes.measure(batch)
        if loss is not None and not math.isfinite(loss):
            self.is_sound = False
            raise guard.spoiled(self.step, f"the loss on the held-out text is {loss}")
        return loss

    def facts(self) -> dict[str, Any]:
        """Everything else that it depends on, as JSON values."""
        return {
            "step": self.step,
            "samples": self.samples,
            "tokens": self.tokens,
            "elapsed_s": self.elapsed_s,
            "heldout_loss": self.recent[-1].heldout_loss if self.recent else None,
            "recent": [asdict(progress) for progress in self.recent],
        }

    def load(self, tensors: Stored, facts: Mapping[str, Any]) -> None:
        """Goes on from where `tensors` and `facts` were taken; the model has its weights of then already."""
        self.step = facts["step"]
        self.samples, self.tokens = place_in_text(self.recipe, facts)
        self._began = time.perf_counter() - facts["elapsed_s"]
        self._share = spent(self.recipe, self.tokens, facts["elapsed_s"])
        self._milestones = int(self._share * self.recipe.run.milestones)
        # Before 0.2.0 progress did not say how many tokens were learned: all steps count alike.
        self.recent.extend(Progress(**{"learned": 1, **progress}) for progress in facts["recent"])
        self._optimizer.load(tensors, self.step)
        self._biases.load(tensors)

    def _learn(self, batch: Batch) -> tuple[Learned, float]:
        """The gradient of the next batch, clipped, and its norm before that."""
        recipe = self.recipe
        with _randomness([recipe.run.seed, self.step, self.ranks.rank], self._passes.device):
            learned = self._passes.learn(batch, recipe.data.windows_at_once, recipe.balance)
        norm = self._optimizer.clip(recipe.optimizer.gradient_clip).item()
        losses = [(each.loss, each.learned) for each in self.recent if each.loss is not None]
        if what := guard.fault(learned.loss.item(), norm, losses, recipe.run.spike):
            self._optimizer.zero_grad()
            raise guard.failure(self.step + 1, self.step, what, norm, self._passes.window_losses(batch))
        return learned, norm

    def _whole_batch(self) -> Batch:
        """The windows of all ranks."""
        batch, vocab_size = self._batch(self.samples), self.recipe.model.vocab_size
        if batch.ids.min() < 0 or batch.ids.max() >= vocab_size:
            raise DataError(
                f"batch {self.step} holds token ids {batch.ids.min()} to {batch.ids.max()}, the model's vocabulary "
                f"ends at {vocab_size - 1}; pack the text with the model's tokenizer"
            )
        return batch

    def _measured(self) -> float | None:
        return None if self._heldout is None else self.measure(self._heldout)

    def _next_share(self) -> float:
        """The share of the budget that the next step takes, as far as it is known before."""
        budget, by_tokens = self.recipe.schedule, spent(self.recipe, self.recipe.data.tokens_per_step, 0.0)
        if budget.max_seconds is None or (budget.max_tokens is not None and not self.step):
            return by_tokens
        return max(by_tokens, self._share / self.step if self.step else FIRST_SHARE)

    def _milestone(self) -> int | None:
        """The milestone that the share of the budget has just reached, from 1."""
        due = int(self._share * self.recipe.run.milestones)
        reached = due if due > self._milestones else None
        self._milestones = due
        return reached


def place_in_text(recipe: Recipe, facts: Mapping[str, Any]) -> tuple[int, int]:
    """Samples and tokens that a run had read when its `facts` were saved."""
    if "samples" in facts:
        return facts["samples"], facts["tokens"]
    # Saved before 0.2.0: all steps had the size that the run was saved with.
    data = facts["recipe"]["data"] if "recipe" in facts else asdict(recipe.data)
    samples = facts["step"] * data["batch_size"]
    return samples, samples * data["sequence_length"]


@contextmanager
def _randomness(seeds: list[int], device: torch.device) -> Iterator[None]:
    """What is random inside depends on these numbers alone, and leaves torch's generators as they were."""
    # Zeros at the end change nothing: the first rank draws what a single process draws.
    mixed = int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0])
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(mixed >> 1)
        yield
