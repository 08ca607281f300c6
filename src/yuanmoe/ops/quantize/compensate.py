"""GPTQ: quantize a weight so that what it computes of given inputs changes least (arXiv 2210.17323).

Inputs are rounded one after the other, those of the largest energy first, and each error is made up for by the inputs
that are still to come; how much each of them takes follows from the inverse of the inputs' second moments. Scales are
searched beforehand on the weight as it is, in their final groups, so the order costs nothing when the weight is used.
Not here: where the moments come from (`checkpoint/quantize/calibration.py`).
Legend: O outputs (rows), I inputs (columns), G groups of a row.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from yuanmoe.errors import CheckpointError
from yuanmoe.ops.quantize.groupwise import QuantizedTensor, quantize_weight

LEAST_DAMPING = 0.01
SCARCITY_DAMPING = 0.06
"""Of the mean energy of an input, added to each: 1 %, or 6 % (I / tokens)^2 where that is more. Moments of few tokens
describe those tokens only: with a fixed 1 % and fewer tokens than half the inputs the result on other tokens was worse
than without any (random mixtures of 256 and 1,024 inputs, 4 bits; the best damping followed this law from I / 4 to 4 I
tokens). With very few it tends to plain rounding."""
BLOCK_COLUMNS = 128
"""Inputs rounded before their errors reach the inputs behind them, in one matrix product."""


class Compensation(NamedTuple):
    """How errors spread: `order` of the inputs, and in that order the upper Cholesky factor [I, I] of the inverse."""

    order: Int[Tensor, " I"]
    factor: Float[Tensor, "I I"]


def compensation(moments: Float[Tensor, "I I"], tokens: int) -> Compensation:
    """Out of the sum of x x^T over the `tokens` inputs x that a weight met; takes I^3 operations.

    Raises CheckpointError for moments that are not finite.
    """
    energy = moments.diagonal()
    order = energy.argsort(descending=True, stable=True)
    ordered = moments[order][:, order]
    diagonal = ordered.diagonal().clone()
    added = max(LEAST_DAMPING, SCARCITY_DAMPING * (len(moments) / max(tokens, 1)) ** 2) * diagonal.mean()
    for tenfold in range(4):  # More where float32 still finds no factor.
        ordered.diagonal().copy_(diagonal + added.clamp(min=1e-30) * 10**tenfold)
        lower, failed = torch.linalg.cholesky_ex(ordered)
        factor, failed_again = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not (failed or failed_again):
            return Compensation(order, factor)
    raise CheckpointError("activations of the calibration text are not finite: the weights or the text are damaged")


def quantize_compensated(
    weight: Float[Tensor, "O I"], spread: Compensation, bits: int, group_size: int
) -> QuantizedTensor:
    """Codes and scales whose products with the calibrated inputs are close to those of `weight`."""
    scales = quantize_weight(weight, bits, group_size, "mse").scales
    steps = scales.float().repeat_interleave(group_size, dim=1)[:, : weight.shape[1]][:, spread.order]
    rounded = _round_in_order(weight.float()[:, spread.order], steps, spread.factor, 2 ** (bits - 1))
    codes = torch.empty_like(rounded)
    codes[:, spread.order] = rounded
    return QuantizedTensor(codes=codes.to(torch.int8), scales=scales, bits=bits, group_size=group_size)


def _round_in_order(weight: Tensor, steps: Tensor, factor: Tensor, top: int) -> Tensor:
    """Integer codes [O, I] in float32; `weight` is used up. Works on columns as rows, which are contiguous."""
    left, steps = weight.T.contiguous(), torch.where(steps == 0, 1.0, steps).T.contiguous()
    codes = torch.empty_like(left)
    for start in range(0, len(left), BLOCK_COLUMNS):
        block = slice(start, start + BLOCK_COLUMNS)
        mine, near = left[block], factor[block, block]
        errors = torch.empty_like(mine)
        for column in range(len(mine)):
            step = steps[start + column]
            code = (mine[column] / step).round_().clamp_(-top, top - 1)
            codes[start + column] = code
            errors[column] = mine[column].sub_(code * step).div_(near[column, column])
            mine[column + 1 :].addr_(near[column, column + 1 :], errors[column], alpha=-1)
        left[start + BLOCK_COLUMNS :].addmm_(factor[block, start + BLOCK_COLUMNS :].T, errors, alpha=-1)
    return codes.T
