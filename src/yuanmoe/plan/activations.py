"""Bytes of intermediate results: those alive at once in a forward pass, and those kept for the backward pass.

Estimates: they count each intermediate of the plain computation once, in bfloat16, and no allocator slack; attention is
fused, so its S x S scores never exist. Legend: D hidden, C = heads x head_dim, E experts, K chosen, F expert width.
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
"""Of one logit in the loss: bfloat16, float32, and its share in float32."""


def activation_bytes(config: ModelConfig, tokens: int, sequences: int = 0) -> int:
    """Bytes alive at the widest point of a layer in a pass over so many tokens, and a row of fp32 logits a sequence."""
    D = config.hidden_size
    attention = 4 * config.attention_size + (7 * D // 2 if config.localized_filtering else D)
    chosen = config.num_experts_per_tok
    shared = config.num_shared_experts * config.moe_intermediate_size
    moe = chosen * (2 * D + 3 * config.moe_intermediate_size) + 3 * shared if config.is_moe else 0
    dense = 0 if all(config.experts_per_layer) else 3 * config.intermediate_size
    widest = 2 * D + max(attention, moe, dense)
    return tokens * widest * STATE_BYTES + sequences * config.vocab_size * 4


def kept_bytes(config: ModelConfig, num_experts: int, checkpointing: Checkpointing) -> int:
    """Bytes that one token leaves in a layer with so many experts until its backward pass."""
    D = config.hidden_size
    if checkpointing == "full":
        return D * STATE_BYTES
    attention, feed_forward = _attention_numbers(config), _feed_forward_numbers(config, num_experts)
    products, cheap = (first + second for first, second in zip(attention, feed_forward, strict=True))
    return (products + (cheap if checkpointing == "none" else 0)) * STATE_BYTES


def _attention_numbers(config: ModelConfig) -> tuple[int, int]:
    """Numbers a token that matrix products and attention gave (the layer's input among them), and all others."""
    D, C = config.hidden_size, config.attention_size
    products, cheap = D + 4 * C, D  # input; q, k, v, result | normed input
    if config.localized_filtering:
        # Two convolutions' results, D / 2 and D | both inputs beside the previous token's, and the normed result.
        products, cheap = products + 3 * D // 2, cheap + 4 * D
    return products, cheap


def _feed_forward_numbers(config: ModelConfig, num_experts: int) -> tuple[int, int]:
    D = config.hidden_size
    if num_experts == 0:
        return D + 2 * config.intermediate_size, D + config.intermediate_size
    width = config.num_experts_per_tok * config.moe_intermediate_size
    always = config.num_shared_experts * config.moe_intermediate_size
    # Experts' inputs count among the products: sending tokens again would cost more than keeping them.
    products = D + 2 * config.num_experts_per_tok * D + 2 * (width + always)
    # The Attention Router relates E x E experts in float32, which is two of these numbers each.
    relations = 2 * num_experts**2 if config.router == "attention" else 0
    return products, D + width + always + relations
