"""Bytes of intermediate results: those alive at once in a forward pass, and those kept for the backward pass.

Estimates: they count large intermediates once, in bfloat16, and no allocator slack; attention is fused, so its S x S
scores never exist. Legend: D hidden, C = heads x head_dim, F expert width.
"""

from typing import Literal, get_args

from yuanmoe.config import ModelConfig
from yuanmoe.plan.cost import STATE_BYTES

Checkpointing = Literal["none", "selective", "full"]
"""What a layer computes again in the backward pass: nothing, all but the results of matrix products and attention, or
everything from its input on."""

CHECKPOINTING: tuple[Checkpointing, ...] = get_args(Checkpointing)

LOSS_BLOCK = 512
"""Tokens whose logits exist at once in training (`ops/cross_entropy.py`)."""

LOGIT_BYTES = 10
"""Bytes of one logit in the loss: bfloat16, float32, and its share in float32."""


def activation_bytes(config: ModelConfig, tokens: int, sequences: int = 0) -> int:
    """Bytes in use at the widest point of a layer in a pass over `tokens`, plus a row of fp32 logits a sequence."""
    D = config.hidden_size
    attention = 4 * config.attention_size + (7 * D // 2 if config.localized_filtering else D)
    chosen = config.num_experts_per_tok
    shared = config.num_shared_experts * config.moe_intermediate_size
    moe = chosen * (2 * D + 3 * config.moe_intermediate_size) + 3 * shared if config.is_moe else 0
    dense = 0 if all(config.experts_per_layer) else 3 * config.intermediate_size
    widest = 2 * D + max(attention, moe, dense)
    return tokens * widest * STATE_BYTES + sequences * config.vocab_size * 4


def kept_bytes(config: ModelConfig, num_experts: int, checkpointing: Checkpointing, *, fused_norms: bool = True) -> int:
    """Bytes that one token keeps in a layer with `num_experts` experts until its backward pass.

    Fused norms keep their input; without such a kernel, on CPUs, torch keeps it twice in float32.
    """
    D = config.hidden_size
    if checkpointing == "full":
        return 2 * D  # the layer's input
    if checkpointing == "selective":
        return 2 * D + _attention_products(config) + _feed_forward_products(config, num_experts)
    return _attention_inputs(config, fused_norms) + _feed_forward_inputs(config, num_experts, fused_norms)


def _attention_products(config: ModelConfig) -> int:
    """Results: queries, keys, values, attention, output projection, and both convolutions."""
    D, C = config.hidden_size, config.attention_size
    return 8 * C + 2 * D + (3 * D if config.localized_filtering else 0)


def _feed_forward_products(config: ModelConfig, num_experts: int) -> int:
    """Results of the first matrices; of experts those of the second ones too, which the router's gradient needs, and
    their inputs, because sending tokens again would cost more than keeping them."""
    if num_experts == 0:
        return 4 * config.intermediate_size
    chosen, F = config.num_experts_per_tok, config.moe_intermediate_size
    return 4 * chosen * (config.hidden_size + F) + 4 * config.num_shared_experts * F


def _attention_inputs(config: ModelConfig, fused_norms: bool) -> int:
    """What each operation keeps of its inputs: norm, projections, attention, and LFA's two convolutions and norm."""
    D, C = config.hidden_size, config.attention_size
    norm = 2 * D if fused_norms else 8 * D
    return norm + 2 * D + 8 * C + (4 * D + 2 * D + norm + 2 * D if config.localized_filtering else 0)


def _feed_forward_inputs(config: ModelConfig, num_experts: int, fused_norms: bool) -> int:
    D, F = config.hidden_size, config.moe_intermediate_size
    norm = (2 * D if fused_norms else 8 * D) + 2 * D
    # SwiGLU keeps gate and up, what SiLU made of the gate, and the product.
    if num_experts == 0:
        return norm + 8 * config.intermediate_size
    # Experts keep their copy of the token, and their result in float32 for its weight's gradient.
    experts = config.num_experts_per_tok * (2 * D + 8 * F + 4 * D)
    # The order of all experts; and of the Attention Router its four rows and the relations between them, in float32.
    router = 8 * num_experts + (4 * (num_experts + 4) * num_experts if config.router == "attention" else 0)
    return norm + experts + 8 * config.num_shared_experts * F + router
