"""`nn.Linear` over the products of `ops.products.linear`, so that LoRA, quantization and sharding find the layer they
know."""

from torch import Tensor, nn

from yuanmoe.model.lora.low_rank import LowRank
from yuanmoe.ops.products.linear import linear, token_exact_linear


class Linear(nn.Linear):
    """A linear layer without bias unless asked for, corrected by `lora` where there is one."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.lora: LowRank | None = None
        self.token_exact = False
        """Whether a token's product is the same bits in any company, as in a quantized model."""

    def forward(self, input: Tensor) -> Tensor:
        product = token_exact_linear if self.token_exact else linear
        out = product(input, self.weight, self.bias)
        return out if self.lora is None else out + self.lora(input)
