"""Matrix products with weights as they are stored, by the fastest exact way of the machine at hand.

A CPU without bfloat16 instructions multiplies bfloat16 matrices some four times slower than float32 ones (measured on
two cores of an AMD Zen 3: 20 against 86 to 120 GFLOP/s). For more than a few tokens the weights are therefore widened
to float32, a block of rows at a time, and multiplied there: the products are the same numbers, summed in float32.
For a few tokens the weights are only read, and the compiled kernels read them at the speed of memory (`ops.native`).

Legend: N tokens, I inputs, O outputs.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from yuanmoe.ops import native
from yuanmoe.ops.products.wide import BLOCK_ELEMENTS, has_bfloat16_matmul, learns_wide, wide_linear

WIDEN_FROM_TOKENS = 12
"""Below this, reading the weights once as they are is faster than widening them."""


def linear(
    x: Float[Tensor, "*N I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"] | None = None
) -> Float[Tensor, "*N O"]:
    """`x` times `weight` transposed, plus `bias`, in the dtype of `x`; that may be float32 over bfloat16 weights."""
    if native.suits_bf16(x, weight):
        out = native.bf16_linear(x, weight)
        return out if bias is None else out + bias
    if widens(x, weight):
        return _widened(x, weight, bias)
    if learns_wide(x, weight):
        out = wide_linear(x, weight)
        return out if bias is None else out + bias
    return F.linear(x, weight, bias)


def token_exact_linear(
    x: Float[Tensor, "*N I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"] | None = None
) -> Float[Tensor, "*N O"]:
    """`linear` whose result for a token is the same bits whatever tokens it is computed with.

    The products of torch choose the order of their sums by the number of tokens; the compiled kernels have one order.
    For the matrices that a quantized model keeps whole, whose other products have this property. Falls back to `linear`
    on a GPU, under a gradient and without the kernels.
    """
    if not native.suits_whole(x, weight):
        return linear(x, weight, bias)
    out = native.whole_linear(x, weight)
    return out if bias is None else out + bias


def widens(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` goes through float32 blocks here: bfloat16 weights on a CPU, no gradient, and either float32
    activations or many of them on a CPU without bfloat16 instructions."""
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    if x.dtype == torch.float32:
        return True
    return x.dtype == torch.bfloat16 and x.numel() >= WIDEN_FROM_TOKENS * x.shape[-1] and not has_bfloat16_matmul()


def _widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    O, I = weight.shape  # noqa: E741
    rows = max(1, min(O, BLOCK_ELEMENTS // I))
    wide = x.reshape(-1, I).float()
    block = torch.empty(rows, I)
    product = torch.empty(wide.shape[0], rows)
    out = x.new_empty(wide.shape[0], O)
    for start in range(0, O, rows):
        count = min(rows, O - start)
        block[:count].copy_(weight[start : start + count])
        part = torch.mm(wide, block[:count].T, out=product[:, :count] if count < rows else product)
        if bias is not None:
            part += bias[start : start + count]
        out[:, start : start + count] = part
    return out.view(*x.shape[:-1], O)
