"""Products with packed 4-bit and 8-bit weights that pass gradients on to what they are applied to.

Forward they are the kernels', which round activations to 8 bits a group; the gradient takes that rounding for the
identity and flows through the weights as they are, code times scale, a block of rows at a time. The weights learn
nothing. So what is learned on top of a quantized model (QLoRA, arXiv 2305.14314) sees the very model that will answer.
Legend: N tokens, I inputs, O outputs, S matrices side by side.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from yuanmoe.ops import native
from yuanmoe.ops.products.wide import BLOCK_ELEMENTS
from yuanmoe.ops.quantize.groupwise import BLOCK_ROWS, PackedTensor, dequantize_weight, matrix_of


def packed_linear(x: Float[Tensor, "*N I"], weight: PackedTensor) -> Float[Tensor, "*N SO"]:
    """`x` times the transposed weight; of a stack [S, O, I] all products side by side. Differentiable once in `x`."""
    if not x.numel():  # an expert that nobody visits
        return x.new_empty(*x.shape[:-1], weight.out_features * len(_matrices(weight)))
    if torch.is_grad_enabled() and x.requires_grad:
        return _PackedLinear.apply(x, weight)  # pyright: ignore[reportReturnType]
    return _product(x, weight)


def _product(x: Tensor, weight: PackedTensor) -> Tensor:
    products = [native.quantized_linear(x, matrix) for matrix in _matrices(weight)]
    return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedTensor) -> Tensor:
        ctx.weight = weight
        return _product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        above = gradients[0].reshape(-1, gradients[0].shape[-1]).float()
        total = above.new_zeros(len(above), ctx.weight.in_features)
        start = 0
        for block in _blocks(ctx.weight):
            total.addmm_(above[:, start : start + len(block)], block)
            start += len(block)
        return total.to(gradients[0].dtype).view(*gradients[0].shape[:-1], -1), None


def _matrices(weight: PackedTensor) -> list[PackedTensor]:
    return [weight] if weight.codes.ndim == 3 else [matrix_of(weight, index) for index in range(len(weight.codes))]


def _blocks(weight: PackedTensor) -> Iterator[Tensor]:
    """All rows in order, some at a time, in float32."""
    step = max(1, BLOCK_ELEMENTS // (BLOCK_ROWS * weight.in_features))
    for matrix in _matrices(weight):
        for start in range(0, len(matrix.codes), step):
            rows = min(step * BLOCK_ROWS, matrix.out_features - start * BLOCK_ROWS)
            part = slice(start, start + step)
            yield dequantize_weight(
                replace(matrix, codes=matrix.codes[part], scales=matrix.scales[part], out_features=rows)
            )
