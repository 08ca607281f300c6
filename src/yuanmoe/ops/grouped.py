"""Mixture-of-experts arithmetic: tokens to their experts, SwiGLU there, and the weighted sum back.

The chosen experts' outputs are weighted and summed in float32 in the order of the router's ranking, so that the result
of a token depends neither on its neighbours nor on the order of experts.
Legend: N tokens, D hidden, E experts, K chosen, F expert width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from yuanmoe.ops.linear import linear, widens

GATHERED_UP_TO_TOKENS = 4
"""On a CPU, up to this many tokens visit their experts one by one; beyond, sorting them by expert pays."""


class Dispatched(NamedTuple):
    """Tokens sorted by expert: `tokens` [N * K, D], `counts` [E] a group, `order` [N * K] into the unsorted choices."""

    tokens: Tensor
    counts: Tensor
    order: Tensor


def dispatch(x: Tensor, experts: Tensor, num_experts: int) -> Dispatched:
    """Copies of `x` [N, D], one for each choice in `experts` [N, K], sorted by expert, first tokens first."""
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=num_experts)
    return Dispatched(x[order // experts.shape[1]], counts, order)


def combine(outputs: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """The inverse of `dispatch`: `outputs` [N * K, D] back in place, summed with `weights` [N, K] (float32): [N, D]."""
    N, K = weights.shape
    place = torch.empty_like(order).scatter_(0, order, torch.arange(N * K, device=order.device))
    chosen = outputs[place].view(N, K, -1).float()
    return (chosen * weights[..., None]).sum(dim=1).to(outputs.dtype)


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Each group of `counts` [E] rows of `x` [M, I] times its own matrix of `weight` [E, O, I]: [M, O]."""
    if _has_grouped_matmul(x, weight):
        offsets = counts.cumsum(0).to(torch.int32)
        return F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)
    groups = zip(x.split(counts.tolist()), weight.unbind(0), strict=True)
    return torch.cat([linear(rows, matrix) if len(rows) else rows @ matrix.T for rows, matrix in groups])


def _has_grouped_matmul(x: Tensor, weight: Tensor) -> bool:
    aligned = weight.shape[1] * weight.element_size() % 16 == 0 and weight.shape[2] * weight.element_size() % 16 == 0
    dtype_fits = x.device.type == "cpu" or x.dtype == torch.bfloat16
    return aligned and dtype_fits and x.dtype == weight.dtype and not widens(x, weight)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(first half) * second half of the last dimension: [.., 2F] to [.., F] (spec 1.9)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def experts_forward(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """The mixture: for each token the sum over its `experts` [N, K] of `weights` [N, K] times expert(x).

    `x` [N, D], `gate_up` [E, 2F, D], `down` [E, D, F]; result [N, D].
    """
    if x.device.type == "cpu" and len(x) <= GATHERED_UP_TO_TOKENS and not torch.is_grad_enabled():
        return _gathered(x, gate_up, down, weights, experts)
    sent = dispatch(x, experts, gate_up.shape[0])
    hidden = swiglu(grouped_linear(sent.tokens, gate_up, sent.counts))
    return combine(grouped_linear(hidden, down, sent.counts), sent.order, weights)


def _gathered(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    rows = []
    for token, chosen, share in zip(x.split(1), experts.tolist(), weights.split(1), strict=True):
        outputs = [linear(swiglu(linear(token, gate_up[e])), down[e]) for e in chosen]
        rows.append((torch.cat(outputs).float() * share.T).sum(dim=0, keepdim=True))
    return torch.cat(rows).to(x.dtype) if rows else x.new_empty(x.shape)


def experts_reference(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """The same as `experts_forward`, written as the paper says it: every expert on every token, unchosen ones at 0."""
    share = torch.zeros(len(x), gate_up.shape[0], device=x.device).scatter_(1, experts, weights.float())
    outputs = torch.stack([swiglu(x @ g.T) @ d.T for g, d in zip(gate_up, down, strict=True)], dim=1)
    return (outputs.float() * share[..., None]).sum(dim=1).to(x.dtype)
