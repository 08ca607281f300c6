"""What the ranks of a run learn and measure together: each with all layers, or pipelines of ranks with a stage each.

Data ranks take their share of the windows. All ranks must call each method together.
"""

from itertools import chain

import numpy as np
import torch

from yuanmoe.data.loader.loader import Batch
from yuanmoe.model.decoder import CausalLM
from yuanmoe.train.parallel.pipeline import evaluate_in_pipeline, learn_in_pipeline, losses_in_pipeline
from yuanmoe.train.parallel.ranks import Ranks
from yuanmoe.train.recipe.recipe import BalanceSettings
from yuanmoe.train.steps.step import Learned, StepSize, Windows, evaluate, learn, window_losses


class Passes:
    """The passes of this rank's model."""

    def __init__(self, model: CausalLM, ranks: Ranks) -> None:
        self._model, self._ranks, self._stages = model, ranks, ranks.stages

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self._model.parameters()).device

    def learn(self, batch: Batch, windows_at_once: int, balance: BalanceSettings) -> Learned:
        """Adds this rank's part of the gradient of the mean loss of `batch`; what all of its windows said."""
        told = (self._windows(batch), windows_at_once, balance)
        if self._stages is None:
            learned = learn(self._model, *told, step=StepSize.of(batch))
        else:
            learned = learn_in_pipeline(self._model, self._stages, *told, step=StepSize.of(batch))
        loss, extra, *load = self._ranks.sums([learned.loss, learned.balance_loss, *learned.load])
        return Learned(loss=loss, balance_loss=extra, load=load)

    def measure(self, batch: Batch) -> float | None:
        """Mean loss of the windows of `batch` in nats a learned token, without dropout; None where none is learned."""
        if not batch.loss_mask.any():
            return None
        own = self._windows(_filled(batch, self._ranks.num_data))
        if self._stages is None:
            loss = evaluate(self._model, own)
        else:
            loss = evaluate_in_pipeline(self._model, self._stages, own)
        if self._ranks.data is None:
            return loss
        found = torch.tensor([loss * own.num_learned, own.num_learned], dtype=torch.float64)
        total, count = self._ranks.sums([found])[0].tolist()
        return total / max(count, 1)

    def window_losses(self, batch: Batch) -> list[float]:
        """The mean loss of each window of `batch` by itself, without dropout."""
        own = self._windows(batch)
        if self._stages is None:
            losses = window_losses(self._model, own)
        else:
            sums = losses_in_pipeline(self._model, self._stages, own, 1)
            losses = [loss / max(part.num_learned, 1) for loss, part in zip(sums, own.split(1), strict=True)]
        # All stages know them; the data ranks of the first are the first of all.
        return list(chain(*self._ranks.all(losses)[: self._ranks.num_data]))

    def _windows(self, batch: Batch) -> Windows:
        return Windows.of(self._ranks.share(batch), self.device)


def _filled(batch: Batch, parts: int) -> Batch:
    """`batch` with windows in which nothing is learned, so that all ranks make as many passes."""
    missing = -len(batch) % parts
    if not missing:
        return batch
    rows = np.minimum(np.arange(len(batch) + missing), len(batch) - 1)
    loss_mask = batch.loss_mask[rows] & (np.arange(len(rows)) < len(batch))[:, None]
    return Batch(ids=batch.ids[rows], loss_mask=loss_mask, documents=batch.documents[rows])
