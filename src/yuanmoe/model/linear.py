"""`nn.Linear` over the products of `ops.linear`, so that LoRA, quantization and sharding find the layer they know."""

from torch import Tensor, nn

from yuanmoe.ops.linear import linear


class Linear(nn.Linear):
    """A linear layer without bias unless asked for."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
