"""Low-rank corrections of a matrix (LoRA, arXiv 2106.09685): W + scale B A, without forming the product.

Legend: N tokens, I inputs, O outputs, R rank, E experts.
"""

from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from yuanmoe.ops.products.linear import token_exact_linear


class Factors(NamedTuple):
    """`a` [R, I] and `b` [O, R], or [E, R, I] and [E, O, R] for a stack; `dropout` of their inputs."""

    a: Tensor
    b: Tensor
    scale: float
    dropout: float = 0.0

    def of(self, expert: int) -> "Factors":
        """Those of one matrix of a stack."""
        return self._replace(a=self.a[expert], b=self.b[expert])

    def seen(self, x: Tensor) -> Tensor:
        """The inputs as the factors see them."""
        return F.dropout(x, self.dropout) if self.dropout else x


def corrected(weight: Float[Tensor, "*E O I"], factors: Factors | None) -> Float[Tensor, "*E O I"]:
    """The matrices themselves with what their factors add."""
    return weight if factors is None else weight + (factors.b @ factors.a).to(weight.dtype) * factors.scale


def correction(x: Float[Tensor, "*N I"], factors: Factors) -> Float[Tensor, "*N O"]:
    """What the factors of one matrix add to its product with `x`; they may have another dtype than `x`."""
    hidden = token_exact_linear(factors.seen(x), factors.a.to(x.dtype))
    return token_exact_linear(hidden, factors.b.to(x.dtype)) * factors.scale
