"""Layers over packed 4-bit and 8-bit weights, which stand in a decoder where those with whole weights were.

Weights are buffers `codes` and `scales` in the layout of the kernels, under the names that they have in a checkpoint,
so they can be mapped files. Not here: which layers (`quantized.py`), the arithmetic (`ops/native`).
Legend: N tokens, D hidden, I inputs, O outputs.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from yuanmoe.model.lora.low_rank import LowRank, factors_of
from yuanmoe.model.router import Routing
from yuanmoe.ops import native
from yuanmoe.ops.products.grouped import experts_forward
from yuanmoe.ops.products.packed_linear import packed_linear
from yuanmoe.ops.quantize.groupwise import PackedTensor
from yuanmoe.ops.quantize.packed_format import PackedFormat, take_rows


class PackedMatrices(nn.Module):
    """Codes and scales of a weight."""

    codes: Tensor
    scales: Tensor

    def __init__(self, form: PackedFormat) -> None:
        super().__init__()
        self.format = form
        self.register_buffer("codes", torch.empty(form.codes_shape, dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(form.scales_shape, dtype=torch.float16))
        self._packed: PackedTensor | None = None

    @property
    def packed(self) -> PackedTensor:
        """What the kernels take; made once, as its checks would cost 2 % of a token."""
        found, buffers = self._packed, self._buffers  # attributes of their own: a buffer's name takes 1 us to resolve
        if found is None or found.codes is not buffers["codes"] or found.scales is not buffers["scales"]:
            found = self._packed = self.format.tensor(self.codes, self.scales)
        return found


class QuantizedLinear(nn.Module):
    """A linear layer in few bits; the bias is whole."""

    def __init__(self, form: PackedFormat, bias: bool = False) -> None:
        super().__init__()
        self.weight = PackedMatrices(form)
        self.bias = nn.Parameter(torch.empty(form.rows), requires_grad=False) if bias else None
        self.lora: LowRank | None = None

    def forward(self, x: Float[Tensor, "*N I"]) -> Float[Tensor, "*N O"]:
        out = packed_linear(x, self.weight.packed)
        out = out if self.bias is None else out + self.bias
        return out if self.lora is None else out + self.lora(x)


class QuantizedExperts(nn.Module):
    """All experts of a layer in few bits, as one fused step unless they are adapted or pass a gradient on."""

    def __init__(self, gate_up: PackedFormat, down: PackedFormat) -> None:
        super().__init__()
        self.gate_up_proj = PackedMatrices(gate_up)
        self.down_proj = PackedMatrices(down)
        self.gate_up_proj_lora: LowRank | None = None
        self.down_proj_lora: LowRank | None = None

    def forward(self, x: Float[Tensor, "N D"], routing: Routing) -> Float[Tensor, "N D"]:
        gate_up, down = self.gate_up_proj.packed, self.down_proj.packed
        factors = factors_of(self.gate_up_proj_lora), factors_of(self.down_proj_lora)
        if factors == (None, None) and not (torch.is_grad_enabled() and x.requires_grad):
            return native.quantized_moe(x, gate_up, down, routing.weights, routing.experts)
        return experts_forward(x, gate_up, down, routing.weights, routing.experts, *factors)


class QuantizedEmbedding(nn.Module):
    """An embedding in few bits: the rows asked for, exactly as the codes say, in `dtype`."""

    def __init__(self, form: PackedFormat, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = PackedMatrices(form)
        self._dtype = dtype

    def forward(self, ids: Int[Tensor, " N"]) -> Float[Tensor, "N D"]:
        return take_rows(self.weight.packed, ids).to(self._dtype)


class WholeEmbedding(nn.Embedding):
    """An embedding in the dtype it is stored in, for activations in another."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        super().__init__(rows, columns)
        self._dtype = dtype

    def forward(self, input: Int[Tensor, " N"]) -> Float[Tensor, "N D"]:
        return super().forward(input).to(self._dtype)
