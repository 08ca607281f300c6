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
    """Whether the products of these are for here: bfloat16 on such a CPU, with a gradient to come."""
    return (
        x.dtype == weight.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and torch.is_grad_enabled()
        and (x.requires_grad or weight.requires_grad)
        and not has_bfloat16_matmul()
    )


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
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        x_gradient, weight_gradient = torch.empty_like(x), torch.empty_like(weight)
        groups = zip(
            *(each.split(ctx.counts) for each in (gradient, x, x_gradient)), weight, weight_gradient, strict=True
        )
        for above, rows, to_rows, matrix, to_matrix in groups:
            if len(rows):
                _multiply_back(above.float(), rows.float(), matrix, to_rows, to_matrix)
            else:
                to_matrix.zero_()
        return x_gradient, weight_gradient, None


def multiply(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """`x` [N, I] times `weight` [O, I] transposed into `out` [N, O]."""
    wide = x.float()
    for block, columns in zip(_blocks(weight), _blocks_of_columns(weight, out), strict=True):
        columns.copy_(wide @ block.float().T)


def _multiply_back(above: Tensor, x: Tensor, weight: Tensor, to_x: Tensor, to_weight: Tensor) -> None:
    """The gradients of `multiply` from that of its result, both operands wide already."""
    total = torch.zeros_like(x)
    for columns, block, to_block in zip(
        _blocks_of_columns(weight, above), _blocks(weight), _blocks(to_weight), strict=True
    ):
        total.addmm_(columns, block.float())
        to_block.copy_(columns.T @ x)
    to_x.copy_(total)


def _blocks(weight: Tensor) -> tuple[Tensor, ...]:
    return weight.split(max(1, BLOCK_ELEMENTS // weight.shape[1]))


def _blocks_of_columns(weight: Tensor, products: Tensor) -> tuple[Tensor, ...]:
    return products.split(max(1, BLOCK_ELEMENTS // weight.shape[1]), dim=1)
