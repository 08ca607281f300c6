"""Products with bfloat16 matrices that learn, on a CPU without bfloat16 instructions: in float32, a block at a time.

Such a CPU multiplies bfloat16 matrices four to nine times slower than float32 ones, forward and backward. Here a block
of rows is widened, multiplied and forgotten in both directions; the products are the same numbers, summed in float32.
Not here: products without gradients, which `linear` widens itself.
Legend: N tokens, O outputs, I inputs, E experts.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_ELEMENTS = 1 << 22
"""Weights widened at a time: 16 MiB of float32. Smaller blocks are no faster, and each is a meeting of all threads."""


def learns_wide(x: Tensor, weight: Tensor) -> bool:
    """Whether the products of these are for here: a gradient to come, and bfloat16 weights on such a CPU, or on any
    under float32 activations."""
    if weight.dtype != torch.bfloat16 or x.device.type != "cpu" or not torch.is_grad_enabled():
        return False
    if not (x.requires_grad or weight.requires_grad):
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and not has_bfloat16_matmul())


def has_bfloat16_matmul() -> bool:
    """Whether oneDNN multiplies bfloat16 with instructions of this CPU (AVX-512 and later, or Arm's)."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def wide_linear(x: Float[Tensor, "*N I"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "*N O"]:
    """`x` times `weight` transposed, differentiable once."""
    rows = x.reshape(-1, x.shape[-1])
    out = _Grouped.apply(rows, weight[None], [len(rows)])
    return out.view(*x.shape[:-1], len(weight))  # pyright: ignore[reportOptionalMemberAccess]


def wide_grouped_linear(
    x: Float[Tensor, "M I"], weight: Float[Tensor, "E O I"], counts: Int[Tensor, " E"]
) -> Float[Tensor, "M O"]:
    """Each group of `counts` rows of `x` times its own matrix of `weight`, differentiable once."""
    return _Grouped.apply(x, weight, counts.tolist())  # pyright: ignore[reportReturnType]


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        out = x.new_empty(len(x), weight.shape[1])
        for rows, matrix, product in zip(x.split(counts), weight, out.split(counts), strict=True):
            if len(rows):
                multiply(rows, matrix, product)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        x_gradient = torch.empty_like(x)
        # A frozen stack, as under LoRA, has no use for a second one of its size.
        weight_gradient = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        groups = zip(*(each.split(ctx.counts) for each in (gradient, x, x_gradient)), strict=True)
        for index, (above, rows, to_rows) in enumerate(groups):
            to_matrix = None if weight_gradient is None else weight_gradient[index]
            if len(rows):
                _multiply_back(above.float(), rows.float(), weight[index], to_rows, to_matrix)
            elif to_matrix is not None:
                to_matrix.zero_()
        return x_gradient, weight_gradient, None


def multiply(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """`x` [N, I] times `weight` [O, I] transposed into `out` [N, O]."""
    wide = x.float()
    for block, columns in zip(_blocks(weight), _blocks_of_columns(weight, out), strict=True):
        columns.copy_(wide @ block.float().T)


def _multiply_back(above: Tensor, x: Tensor, weight: Tensor, to_x: Tensor, to_weight: Tensor | None) -> None:
    """The gradients of `multiply` from that of its result, both operands wide already."""
    total = torch.zeros_like(x)
    start = 0
    for columns, block in zip(_blocks_of_columns(weight, above), _blocks(weight), strict=True):
        total.addmm_(columns, block.float())
        if to_weight is not None:
            to_weight[start : start + len(block)] = columns.T @ x
        start += len(block)
    to_x.copy_(total)


def _blocks(weight: Tensor) -> tuple[Tensor, ...]:
    return weight.split(max(1, BLOCK_ELEMENTS // weight.shape[1]))


def _blocks_of_columns(weight: Tensor, products: Tensor) -> tuple[Tensor, ...]:
    return products.split(max(1, BLOCK_ELEMENTS // weight.shape[1]), dim=1)
