"""The factors of one matrix as a module, which the layers of the model have a place for (`lora.py` fills it).

Source: LoRA, arXiv 2106.09685. Legend: N tokens, I inputs, O outputs, R rank, E experts.
"""

from jaxtyping import Float
from torch import Tensor, nn

from yuanmoe.ops.products.low_rank import Factors, correction


class LowRank(nn.Module):
    """A correction scale B A of a matrix: `a` [R, I], `b` [O, R]; of a stack of them [E, R, I], [E, O, R]."""

    def __init__(self, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.a = nn.Parameter(a)
        self.b = nn.Parameter(b)
        self.scale = scale
        self.dropout = dropout

    @property
    def factors(self) -> Factors:
        return Factors(self.a, self.b, self.scale, self.dropout if self.training else 0.0)

    def forward(self, x: Float[Tensor, "*N I"]) -> Float[Tensor, "*N O"]:
        return correction(x, self.factors)


def factors_of(slot: LowRank | None) -> Factors | None:
    """The factors in a place for them, if there are any."""
    return None if slot is None else slot.factors
