"""One step of training and one measurement: a model and token windows in, a loss and the experts' load out.

Legend: B windows, S tokens a window teaches, L layers with experts, E experts, K chosen.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from yuanmoe.model.decoder import YuanForCausalLM
from yuanmoe.model.router import Routing
from yuanmoe.ops.cross_entropy import head_cross_entropy


class Step(NamedTuple):
    """What one step tells. Losses are nats a token."""

    loss: float
    gradient_norm: float
    """Before clipping."""
    load: list[Tensor]
    """A layer with experts: how many choices of its tokens fell on each, [E]; together B * S * K."""


def forward_loss(model: YuanForCausalLM, windows: Tensor) -> tuple[Tensor, tuple[Routing, ...]]:
    """Mean cross-entropy of `windows` [B, S + 1], each token but the first predicted from those before it."""
    hidden, routings = model.read(windows[:, :-1])
    return head_cross_entropy(hidden.flatten(0, 1), model.head_weight, windows[:, 1:].flatten()), routings


def train_step(model: YuanForCausalLM, optimizer: torch.optim.Optimizer, windows: Tensor, gradient_clip: float) -> Step:
    """Moves the parameters one step down the loss of `windows` [B, S + 1]."""
    loss, routings = forward_loss(model, windows)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), gradient_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Step(loss.item(), norm.item(), [expert_load(routing) for routing in routings])


def expert_load(routing: Routing) -> Tensor:
    """How many of the tokens' choices fell on each expert, [E]."""
    return torch.bincount(routing.experts.flatten(), minlength=routing.logits.shape[1])


@torch.inference_mode()
def evaluate(model: YuanForCausalLM, windows: Tensor, batch_size: int = 32) -> float:
    """Mean loss of `windows` [B, S + 1] in nats a token, as the model is in use: without dropout."""
    training = model.training
    model.eval()
    batches = windows.split(batch_size)
    total = math.fsum(forward_loss(model, batch)[0].item() * len(batch) for batch in batches)
    model.train(training)
    return total / len(windows)
