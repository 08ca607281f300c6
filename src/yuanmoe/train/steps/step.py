"""One step's gradient and one measurement: a model and token windows in, a loss and the experts' load out.

Legend: B windows, S tokens a window teaches, L layers with experts, E experts, K chosen.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from yuanmoe.data.loader.loader import Batch
from yuanmoe.model.decoder import CausalLM
from yuanmoe.model.router import Routing
from yuanmoe.ops.cross_entropy import head_cross_entropy
from yuanmoe.train.recipe.recipe import BalanceSettings
from yuanmoe.train.steps.balance import balance_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """What the windows of one step said before they moved anything."""

    loss: Tensor
    """Mean cross-entropy in nats a learned token, []."""
    balance_loss: Tensor
    """What the balance of experts added to it, []."""
    load: list[Tensor]
    """A layer with experts: how many choices of its tokens fell on each, [E]; together B * S * K."""


class Windows(NamedTuple):
    """Token windows where the model is. What is None, all windows of a kind have: every token is learned."""

    ids: Tensor
    """[B, S + 1]: each token but the first is predicted from those before it."""
    learned: Tensor | None = None
    """[B, S]: which of the predicted tokens count; None is all."""
    documents: Tensor | None = None
    """[B, S], of the tokens read: numbers that change where a document begins; None is behind every `<eod>`."""

    @classmethod
    def of(cls, batch: Batch, device: torch.device | str) -> "Windows":
        """A batch of the loader, on a device."""
        learned = None if batch.loss_mask.all() else torch.from_numpy(batch.loss_mask).to(device)
        ids, documents = (torch.from_numpy(part).to(device) for part in (batch.ids, batch.documents))
        return cls(ids, learned, documents)

    @property
    def num_learned(self) -> int:
        """Tokens that are learned."""
        return self.ids[:, 1:].numel() if self.learned is None else int(self.learned.sum())

    def split(self, size: int) -> Iterator["Windows"]:
        """Up to `size` windows at a time."""
        for start in range(0, len(self.ids), size):
            rows = slice(start, start + size)
            learned, documents = (None if part is None else part[rows] for part in self[1:])
            yield Windows(self.ids[rows], learned, documents)


def forward_loss(model: CausalLM, windows: Windows, count: int | None = None) -> tuple[Tensor, tuple[Routing, ...]]:
    """Mean cross-entropy of the tokens of `windows` that are learned, or their sum over another `count`."""
    hidden, routings = model.read(windows.ids[:, :-1], windows.documents)
    return head_loss(model, hidden, windows, count), routings


def head_loss(model: CausalLM, hidden: Tensor, windows: Windows, count: int | None = None) -> Tensor:
    """The same of the final hidden states [B, S, D] of `windows`."""
    targets = windows.ids[:, 1:]
    chosen = (slice(None), slice(None)) if windows.learned is None else windows.learned
    hidden, targets = hidden[chosen].flatten(0, -2), targets[chosen].flatten()
    # Where nothing is learned the loss is 0 and so is its gradient.
    count = max(len(targets), 1) if count is None else count
    return head_cross_entropy(hidden, model.whole_head(hidden.dtype), targets, count)


class StepSize(NamedTuple):
    """What a step learns from on all ranks together."""

    windows: int
    learned: int
    """Tokens."""

    @classmethod
    def of(cls, batch: Batch) -> "StepSize":
        """Of the batch that the ranks divide."""
        return cls(len(batch), int(batch.loss_mask.sum()))


def learn(
    model: CausalLM,
    windows: Windows,
    windows_at_once: int,
    balance: BalanceSettings,
    step: StepSize | None = None,
) -> Learned:
    """Adds the gradient of the mean loss of `windows` to the parameters, some windows at a time.

    The mean is over all tokens that are learned, however they are spread; where `windows` are a rank's part of a `step`
    what comes out is its part of the mean. The losses that balance experts count the windows at once, as in the
    released training's micro-batches.
    """
    loss = extra = torch.zeros((), device=windows.ids.device)
    load: list[Tensor] = []
    step = step or StepSize(len(windows.ids), windows.num_learned)
    for part in windows.split(windows_at_once):
        part_loss, routings = forward_loss(model, part, max(step.learned, 1))
        part_extra = balance_loss(routings, balance)
        if part_extra is not None:
            part_extra = part_extra * (len(part.ids) / step.windows)
            extra = extra + part_extra.detach()
        (part_loss if part_extra is None else part_loss + part_extra).backward()
        loss = loss + part_loss.detach()
        counts = [expert_load(routing) for routing in routings]
        load = [before + now for before, now in zip(load, counts, strict=True)] if load else counts
    return Learned(loss=loss, balance_loss=extra, load=load)


def expert_load(routing: Routing) -> Tensor:
    """How many of the tokens' choices fell on each expert, [E]."""
    return torch.bincount(routing.experts.flatten(), minlength=routing.logits.shape[1])


def window_losses(model: CausalLM, windows: Windows) -> list[float]:
    """The loss of each of `windows` by itself, as the model is in use: without dropout."""
    return [evaluate(model, window) for window in windows.split(1)]


@torch.inference_mode()
def evaluate(model: CausalLM, windows: Windows, batch_size: int = 32) -> float:
    """Mean loss of `windows` in nats a learned token, as the model is in use: without dropout."""
    training = model.training
    model.eval()
    count = max(windows.num_learned, 1)
    total = math.fsum(forward_loss(model, part, count)[0].item() for part in windows.split(batch_size))
    model.train(training)
    return total
