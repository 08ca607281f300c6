"""The decoder over packed 4-bit and 8-bit weights: other layers in the same model, put there from outside.

Activations stay float32 on a CPU (`docs/numerics.md`); routers and norms are whole. Whole matrices are multiplied by
kernels with one order of summation, so that a token's result is the same bits in any company, as packed ones give it.
The weights learn nothing; what they are applied to has a gradient, so that adapters learn before and beside them.
Not here: files (`checkpoint/load.py`), the layers themselves (`quantized_layers.py`).
Legend: N tokens, D hidden, V vocabulary.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from yuanmoe.config import ModelConfig
from yuanmoe.model.decoder import CausalLM
from yuanmoe.model.experts import Experts
from yuanmoe.model.linear import Linear
from yuanmoe.model.quantized.layers import (
    PackedMatrices,
    QuantizedEmbedding,
    QuantizedExperts,
    QuantizedLinear,
    WholeEmbedding,
)
from yuanmoe.model.router import Projection
from yuanmoe.ops.products.linear import token_exact_linear
from yuanmoe.ops.products.packed_linear import packed_linear
from yuanmoe.ops.quantize.groupwise import dequantize_weight
from yuanmoe.ops.quantize.packed_format import PackedFormat


class QuantizedYuan(CausalLM):
    """The model whose output head may be in few bits, and whose keys and values are bfloat16 unless told otherwise."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.kv_dtype = torch.bfloat16

    def head_product(self, hidden: Float[Tensor, "*N D"]) -> Float[Tensor, "*N V"]:
        head = self.head_weight
        return (
            packed_linear(hidden, head.packed) if isinstance(head, PackedMatrices) else token_exact_linear(hidden, head)
        )

    def stored_head(self, dtype: torch.dtype) -> Float[Tensor, "V D"]:
        head = self.head_weight
        return dequantize_weight(head.packed, dtype) if isinstance(head, PackedMatrices) else super().stored_head(dtype)


def quantized_model(config: ModelConfig, formats: Mapping[str, PackedFormat], dtype: torch.dtype) -> QuantizedYuan:
    """A model with the weights of these names in few bits, for activations in `dtype`; its weights are not set yet."""
    model = QuantizedYuan(config)
    model.model.embed_tokens = WholeEmbedding(config.vocab_size, config.hidden_size, dtype)
    for name, form in formats.items():
        path = name.removesuffix(".weight")
        if path.endswith(".experts.gate_up_proj"):
            down = formats[path.replace("gate_up_proj", "down_proj")]
            model.set_submodule(path.rpartition(".")[0], QuantizedExperts(form, down))
        elif path.endswith("embed_tokens"):
            model.set_submodule(path, QuantizedEmbedding(form, dtype))
        elif not path.endswith(".experts.down_proj"):
            replaced = model.get_submodule(path)
            assert isinstance(replaced, nn.Linear)
            model.set_submodule(path, QuantizedLinear(form, bias=replaced.bias is not None))
    for module in model.modules():
        if isinstance(module, (Linear, Projection, Experts)):
            module.token_exact = True
    return model.requires_grad_(False)
