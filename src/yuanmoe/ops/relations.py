"""The Attention Router's scores: how each expert relates to all others, for one token (arXiv 2405.17976 section 3).

Those E x E numbers a token are few FLOPs but much memory: left to automatic differentiation they took 30 % of a
training step of a small model (D = 128, E = 32, CPU). Here the gradient is a closed form that reads them three times
and keeps nothing else of their size, and a CPU works on blocks that stay in its cache.
Legend: N tokens, E experts.
"""

from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor
from torch.autograd.function import once_differentiable

CPU_BLOCK_TOKENS = 256
"""1 MiB of float32 at 32 experts; blocks of 128 to 512 tokens measured alike, all tokens at once half as fast."""


def relate(q: Float32[Tensor, "N E"], k: Float32[Tensor, "N E"], v: Float32[Tensor, "N E"]) -> Float32[Tensor, "N E"]:
    """P_i = sum_j softmax_j(q_i k_j) v_j; differentiable once."""
    scores = _Relate.apply if torch.is_grad_enabled() else _scores
    if q.device.type != "cpu" or len(q) <= CPU_BLOCK_TOKENS:
        return scores(q, k, v)
    parts = zip(q.split(CPU_BLOCK_TOKENS), k.split(CPU_BLOCK_TOKENS), v.split(CPU_BLOCK_TOKENS), strict=True)
    return torch.cat([scores(*part) for part in parts])


def relations(q: Float32[Tensor, "N E"], k: Float32[Tensor, "N E"]) -> Float32[Tensor, "N E E"]:
    """A_ij = softmax_j(q_i k_j): how much expert i regards expert j."""
    return (q[:, :, None] * k[:, None, :]).softmax(dim=-1)


def relate_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same as the formula reads."""
    shares = (q[:, :, None] * k[:, None, :]).exp()
    return (shares / shares.sum(dim=-1, keepdim=True) @ v[:, :, None]).squeeze(-1)


class _Relate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shares = relations(q, k)
        scores = _weighted(shares, v)
        ctx.save_for_backward(q, k, v, shares, scores)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """With shares A and gradient g, the gradient of the products q_i k_j is g_i A_ij (v_j - P_i).

        Its sums over i and over j come apart into sums of A with vectors.
        """
        (gradient,) = gradients
        q, k, v, shares, scores = ctx.saved_tensors
        q_gradient = gradient * (_weighted(shares, v * k) - scores * _weighted(shares, k))
        through_q = gradient * q
        sums = torch.stack([gradient, through_q, through_q * scores], dim=1) @ shares
        v_gradient, rising, falling = sums.unbind(dim=1)
        return q_gradient, v * rising - falling, v_gradient


def _scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _weighted(relations(q, k), v)


def _weighted(shares: Tensor, values: Tensor) -> Tensor:
    """sum_j A_ij values_j, [N, E]; elementwise, because N products with one small vector each are slower."""
    return (shares * values[:, None, :]).sum(dim=-1)
