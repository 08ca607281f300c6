"""Mixture-of-experts arithmetic: tokens to their experts, SwiGLU there, and the weighted sum back.

The chosen experts' outputs are weighted and summed in float32 in the order of the router's ranking, so that the result
of a token depends neither on its neighbours nor on the order of experts.
Legend: N tokens, D hidden, E experts, K chosen, F expert width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from yuanmoe.ops import native
from yuanmoe.ops.products.linear import linear, token_exact_linear, widens
from yuanmoe.ops.products.low_rank import Factors, corrected, correction
from yuanmoe.ops.products.packed_linear import packed_linear
from yuanmoe.ops.products.wide import learns_wide, wide_grouped_linear
from yuanmoe.ops.quantize.groupwise import PackedTensor, matrix_of

GATHERED_UP_TO_TOKENS = 4
"""On a CPU, up to this many tokens visit their experts one by one; beyond, sorting them by expert pays."""

_Stack = tuple[Tensor | PackedTensor, Factors | None]
"""The matrices of all experts, and their factors where they are adapted."""


class Dispatched(NamedTuple):
    """Tokens sorted by expert: `tokens` [N * K, D], `counts` [E] a group, `order` [N * K] into the unsorted choices."""

    tokens: Tensor
    counts: Tensor
    order: Tensor


def dispatch(x: Float[Tensor, "N D"], experts: Int[Tensor, "N K"], num_experts: int) -> Dispatched:
    """Copies of `x`, one for each choice in `experts`, sorted by expert, first tokens first."""
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    # Not bincount: on a GPU it waits for the largest value to size its result.
    counts = flat.new_zeros(num_experts).scatter_add_(0, flat, torch.ones_like(flat))
    return Dispatched(x[order // experts.shape[1]], counts, order)


def combine(
    outputs: Float[Tensor, "NK D"], order: Int[Tensor, " NK"], weights: Float[Tensor, "N K"]
) -> Float[Tensor, "N D"]:
    """The inverse of `dispatch`: `outputs` back in place, summed with `weights` in float32."""
    chosen = unsorted(outputs, order).view(*weights.shape, outputs.shape[1])
    return _weighted_sum(chosen, weights).to(outputs.dtype)


def unsorted(rows: Float[Tensor, "M D"], order: Int[Tensor, " M"]) -> Float[Tensor, "M D"]:
    """`rows` that are sorted by `order`, as they were before."""
    return rows[torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))]


def grouped_linear(
    x: Float[Tensor, "M I"],
    weight: Float[Tensor, "E O I"] | PackedTensor,
    counts: Int[Tensor, " E"],
    factors: Factors | None = None,
    *,
    token_exact: bool = False,
) -> Float[Tensor, "M O"]:
    """Each group of `counts` rows of `x` times its own matrix of `weight`, corrected by its own `factors`.

    `token_exact` products, see `token_exact_linear`; those of packed weights are so anyway.
    """
    token_exact = token_exact or isinstance(weight, PackedTensor)
    out = _grouped_product(x, weight, counts, token_exact)
    if factors is None:
        return out
    hidden = _grouped_product(factors.seen(x), factors.a.to(x.dtype), counts, token_exact)
    return out + _grouped_product(hidden, factors.b.to(x.dtype), counts, token_exact) * factors.scale


def _grouped_product(x: Tensor, weight: Tensor | PackedTensor, counts: Tensor, token_exact: bool) -> Tensor:
    if not isinstance(weight, PackedTensor) and token_exact and native.suits_whole(x, weight):
        groups = zip(x.split(counts.tolist()), weight.unbind(0), strict=True)
        return torch.cat([token_exact_linear(rows, matrix) for rows, matrix in groups])
    if isinstance(weight, PackedTensor):
        groups = enumerate(x.split(counts.tolist()))
        return torch.cat([packed_linear(rows, matrix_of(weight, expert)) for expert, rows in groups])
    if learns_wide(x, weight):
        return wide_grouped_linear(x, weight, counts)
    if _has_grouped_matmul(x, weight):
        offsets = counts.cumsum(0).to(torch.int32)
        return F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)
    groups = zip(x.split(counts.tolist()), weight.unbind(0), strict=True)
    return torch.cat([linear(rows, matrix) for rows, matrix in groups])


def _has_grouped_matmul(x: Tensor, weight: Tensor) -> bool:
    aligned = weight.shape[1] * weight.element_size() % 16 == 0 and weight.shape[2] * weight.element_size() % 16 == 0
    dtype_fits = x.dtype == torch.bfloat16 or (x.device.type == "cpu" and x.dtype in (torch.float32, torch.float16))
    return aligned and dtype_fits and x.dtype == weight.dtype and not widens(x, weight)


def swiglu(gate_up: Float[Tensor, "*N FF"]) -> Float[Tensor, "*N F"]:
    """silu(first half) * second half of the last dimension (spec 1.9)."""
    if kernels := native.single(gate_up):
        return kernels.swiglu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def expert_networks(
    tokens: Float[Tensor, "M D"],
    counts: Int[Tensor, " E"],
    gate_up: Float[Tensor, "E FF D"] | PackedTensor,
    down: Float[Tensor, "E D F"] | PackedTensor,
    gate_up_factors: Factors | None = None,
    down_factors: Factors | None = None,
    *,
    token_exact: bool = False,
) -> Float[Tensor, "M D"]:
    """What each expert makes of its group of `counts` rows of `tokens`; FF is 2 F."""
    hidden = swiglu(grouped_linear(tokens, gate_up, counts, gate_up_factors, token_exact=token_exact))
    return grouped_linear(hidden, down, counts, down_factors, token_exact=token_exact)


def experts_forward(
    x: Float[Tensor, "N D"],
    gate_up: Float[Tensor, "E FF D"] | PackedTensor,
    down: Float[Tensor, "E D F"] | PackedTensor,
    weights: Float[Tensor, "N K"],
    experts: Int[Tensor, "N K"],
    gate_up_factors: Factors | None = None,
    down_factors: Factors | None = None,
    *,
    token_exact: bool = False,
) -> Float[Tensor, "N D"]:
    """The mixture: for each token the sum over its `experts` of `weights` times expert(x); FF is 2 F.

    Packed weights are gate_up [E, 2, F, D] and down [E, D, F]; their fused kernel is `native.quantized_moe`, without
    gradients and factors. `token_exact`: the same bits for a token in any company, as `token_exact_linear` says.
    """
    plain = gate_up_factors is None and down_factors is None
    suits = native.suits_whole if token_exact else native.suits_bf16
    if plain and isinstance(gate_up, Tensor) and isinstance(down, Tensor) and suits(x, gate_up, down):
        return native.whole_moe(x, gate_up, down, weights, experts)
    if x.device.type == "cpu" and 0 < len(x) <= GATHERED_UP_TO_TOKENS and not torch.is_grad_enabled():
        product = token_exact_linear if token_exact else linear
        return _gathered(x, (gate_up, gate_up_factors), (down, down_factors), weights, experts, product)
    sent = dispatch(x, experts, len(gate_up.codes if isinstance(gate_up, PackedTensor) else gate_up))
    outputs = expert_networks(
        sent.tokens, sent.counts, gate_up, down, gate_up_factors, down_factors, token_exact=token_exact
    )
    return combine(outputs, sent.order, weights)


def _gathered(
    x: Tensor, gate_up: _Stack, down: _Stack, weights: Tensor, experts: Tensor, product: Callable[..., Tensor]
) -> Tensor:
    rows = []
    for token, chosen, share in zip(x.split(1), experts.tolist(), weights.split(1), strict=True):
        outputs = [_expert_linear(swiglu(_expert_linear(token, gate_up, e, product)), down, e, product) for e in chosen]
        rows.append(_weighted_sum(torch.cat(outputs)[None], share))
    return torch.cat(rows).to(x.dtype)


def _weighted_sum(outputs: Tensor, weights: Tensor) -> Tensor:
    """The sum over K of `outputs` [N, K, D] times `weights` [N, K] in float32, from the first to the last.

    `sum` takes more than four terms in an order that depends on the shape.
    """
    parts = outputs.float() * weights[..., None]
    if torch.is_grad_enabled():
        return parts.sum(dim=1)
    total, *others = parts.unbind(dim=1)
    for part in others:
        total = total + part
    return total


def _expert_linear(x: Tensor, stack: _Stack, expert: int, product: Callable[..., Tensor]) -> Tensor:
    """`x` times one matrix of a stack, corrected by its factors."""
    weight, factors = stack
    packed = isinstance(weight, PackedTensor)
    out = packed_linear(x, matrix_of(weight, expert)) if packed else product(x, weight[expert])
    return out if factors is None else out + correction(x, factors.of(expert))


def experts_reference(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up_factors: Factors | None = None,
    down_factors: Factors | None = None,
) -> Tensor:
    """The same as `experts_forward`, written as the paper says it: every expert on every token, unchosen ones at 0."""
    gate_up, down = corrected(gate_up, gate_up_factors), corrected(down, down_factors)
    share = torch.zeros(len(x), gate_up.shape[0], device=x.device).scatter_(1, experts, weights.float())
    outputs = torch.stack([swiglu(x @ g.T) @ d.T for g, d in zip(gate_up, down, strict=True)], dim=1)
    return (outputs.float() * share[..., None]).sum(dim=1).to(x.dtype)
