"""Cross-entropy of the output head, block by block: the logits of all tokens never exist together.

The Yuan 2.0 paper's block-wise cross-entropy (arXiv 2311.15786 section 3.4), and one step more: a block's gradient is
taken while its logits are there, so that the backward pass neither keeps nor recomputes them.
Legend: N tokens, D hidden, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from yuanmoe.ops.products.linear import linear, widens

BLOCK_TOKENS = 512
"""Tokens whose logits exist at a time. Fewer save memory, but the gradient of the weight is added to once a block."""


def head_cross_entropy(
    hidden: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], targets: Int[Tensor, "N"], count: int | None = None
) -> Float32[Tensor, ""]:
    """Sum over N tokens of -log p(target), in nats, under the logits `hidden @ weight.T`, divided by `count`.

    By default the mean; another count makes these tokens a part of more. Differentiable once, in `hidden` and `weight`.
    """
    count = len(targets) if count is None else count
    return _HeadCrossEntropy.apply(hidden, weight, targets, count)  # pyright: ignore[reportReturnType]


def head_cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor, count: int | None = None) -> Tensor:
    """The same with all logits at once."""
    total = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")
    return total / (len(targets) if count is None else count)


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, count: int) -> Tensor:
        to_hidden, to_weight, *_ = ctx.needs_input_grad
        loss = torch.zeros((), device=hidden.device)
        hidden_gradient = torch.empty_like(hidden) if to_hidden or to_weight else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if to_weight else None
        for start in range(0, len(targets), BLOCK_TOKENS):
            block = slice(start, start + BLOCK_TOKENS)
            block_loss, error = _loss_and_error(linear(hidden[block], weight).float(), targets[block, None])
            loss += block_loss
            if hidden_gradient is not None:
                error.div_(count)
                _add_gradients(error, hidden[block], weight, hidden_gradient[block], weight_gradient)
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = gradients
        hidden_gradient, weight_gradient = ctx.saved_tensors
        weight_gradient = None if weight_gradient is None else weight_gradient * gradient
        return hidden_gradient * gradient.to(hidden_gradient.dtype), weight_gradient, None, None


def _add_gradients(error: Tensor, hidden: Tensor, weight: Tensor, to_hidden: Tensor, to_weight: Tensor | None) -> None:
    """What a block's `error` [B, V] in its logits says to its `hidden` [B, D] and, in float32, to `weight` [V, D]."""
    narrow = error.to(hidden.dtype)
    to_hidden.copy_(linear(narrow, weight.T))
    if to_weight is None:
        return
    if widens(hidden, weight):
        to_weight.addmm_(error.T, hidden.float())
    else:
        to_weight += narrow.T @ hidden


def _loss_and_error(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The summed loss of one block of `logits` [B, V], `targets` [B, 1], and its gradient in the logits, [B, V]."""
    shares = logits.softmax(dim=-1)
    # log(sum(exp)) = largest logit - log(largest share): no second pass of exponentials, and no log of an underflow.
    log_normalizer = logits.amax(dim=-1, keepdim=True) - shares.amax(dim=-1, keepdim=True).log()
    loss = (log_normalizer - logits.gather(1, targets)).sum()
    return loss, shares.scatter_add_(1, targets, torch.full_like(log_normalizer, -1.0))
