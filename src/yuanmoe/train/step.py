"""One step's gradient and one measurement: a model and token windows in, a loss and the experts' load out.

Legend: B windows, S tokens a window teaches, L layers with experts, E experts, K chosen.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from yuanmoe.model.decoder import YuanForCausalLM
from yuanmoe.model.router import Routing
from yuanmoe.ops.cross_entropy import head_cross_entropy
from yuanmoe.train.balance import balance_loss
from yuanmoe.train.recipe import BalanceSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """What the windows of one step said before they moved anything."""

    loss: Tensor
    """Mean cross-entropy in nats a token, []."""
    balance_loss: Tensor
    """What the balance of experts added to it, []."""
    load: list[Tensor]
    """A layer with experts: how many choices of its tokens fell on each, [E]; together B * S * K."""


def forward_loss(model: YuanForCausalLM, windows: Tensor) -> tuple[Tensor, tuple[Routing, ...]]:
    """Mean cross-entropy of `windows` [B, S + 1], each token but the first predicted from those before it."""
    hidden, routings = model.read(windows[:, :-1])
    return head_cross_entropy(hidden.flatten(0, 1), model.whole_head(hidden.dtype), windows[:, 1:].flatten()), routings


def learn(model: YuanForCausalLM, windows: Tensor, windows_at_once: int, balance: BalanceSettings) -> Learned:
    """Adds the gradient of the mean loss of `windows` [B, S + 1] to the parameters, some windows at a time.

    The losses that balance experts count the windows at once, as in the released training's micro-batches.
    """
    loss = extra = torch.zeros((), device=windows.device)
    load: list[Tensor] = []
    for part in windows.split(windows_at_once):
        share = len(part) / len(windows)
        part_loss, routings = forward_loss(model, part)
        part_extra = balance_loss(routings, balance)
        ((part_loss if part_extra is None else part_loss + part_extra) * share).backward()
        loss = loss + part_loss.detach() * share
        extra = extra if part_extra is None else extra + part_extra.detach() * share
        counts = [expert_load(routing) for routing in routings]
        load = [before + now for before, now in zip(load, counts, strict=True)] if load else counts
    return Learned(loss=loss, balance_loss=extra, load=load)


def expert_load(routing: Routing) -> Tensor:
    """How many of the tokens' choices fell on each expert, [E]."""
    return torch.bincount(routing.experts.flatten(), minlength=routing.logits.shape[1])


def window_losses(model: YuanForCausalLM, windows: Tensor) -> list[float]:
    """The loss of each of `windows` [B, S + 1] by itself, as the model is in use: without dropout."""
    return [evaluate(model, window) for window in windows.split(1)]


@torch.inference_mode()
def evaluate(model: YuanForCausalLM, windows: Tensor, batch_size: int = 32) -> float:
    """Mean loss of `windows` [B, S + 1] in nats a token, as the model is in use: without dropout."""
    training = model.training
    model.eval()
    batches = windows.split(batch_size)
    total = math.fsum(forward_loss(model, batch)[0].item() * len(batch) for batch in batches)
    model.train(training)
    return total / len(windows)
