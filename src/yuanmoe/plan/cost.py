"""Parameters, FLOPs and bytes of a Yuan model, from its configuration alone; the only place that counts them.

Everything is a sum over one inventory, `weights(config)`: which matrices and vectors there are, how many equal ones are
stored, and how many of them work for one token. Sources: arXiv 2405.17976 (M32 and its table of efficiency),
arXiv 2311.15786 (LFA). One multiplication or one addition is one FLOP.
Legend: D hidden, C = heads x head_dim, E experts, K chosen, F expert width, I dense width, V vocabulary, S context.
Not here: intermediate results (`activations.py`), devices, memory limits and time (`device/planner.py`,
`cluster/search.py`).
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from yuanmoe.config import ModelConfig
from yuanmoe.errors import UsageError

Role = Literal["embedding", "head", "attention", "lfa", "router", "norms", "experts", "shared_experts", "dense"]
ROLES: tuple[Role, ...] = get_args(Role)

STATE_BYTES = 2
"""Bytes of one cached or intermediate number: keys, values, LFA state and activations are bf16."""

SECONDS_PER_DAY = 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """Equal weights of one layer: `copies` are stored, of which `active` are used for one token."""

    role: Role
    shape: tuple[int, ...]
    """Of one copy; a matrix is [outputs, inputs]."""
    copies: int = 1
    active: int = 1

    @property
    def size(self) -> int:
        """Parameters of one copy."""
        return math.prod(self.shape)


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """Every weight of the model."""
    layers = (weight for experts in config.experts_per_layer for weight in layer_weights(config, experts))
    return (*outside_weights(config), *layers)


def outside_weights(config: ModelConfig) -> tuple[Weight, ...]:
    """Those of no layer; a tied head is stored 0 times and works once, the embedding is only looked up."""
    shape = (config.vocab_size, config.hidden_size)
    return (
        Weight(role="embedding", shape=shape, active=0),
        Weight(role="head", shape=shape, copies=0 if config.tie_word_embeddings else 1),
        Weight(role="norms", shape=(config.hidden_size,)),
    )


def layer_weights(config: ModelConfig, num_experts: int) -> Iterator[Weight]:
    """Those of a layer with so many routed experts, or with a dense network where there are none."""
    D, C = config.hidden_size, config.attention_size
    yield Weight(role="norms", shape=(D,), copies=2, active=2)
    yield Weight(role="attention", shape=(C, D), copies=3, active=3)
    yield Weight(role="attention", shape=(D, C))
    if config.localized_filtering:
        yield Weight(role="lfa", shape=(D // 2, 2 * D))
        yield Weight(role="lfa", shape=(D // 2,))
        yield Weight(role="lfa", shape=(D, D))
        yield Weight(role="lfa", shape=(D,))
        yield Weight(role="norms", shape=(D,))
    yield from _experts(config, num_experts) if num_experts else _feed_forward("dense", D, config.intermediate_size)


def _experts(config: ModelConfig, num_experts: int) -> Iterator[Weight]:
    D, F = config.hidden_size, config.moe_intermediate_size
    router_rows = 3 * num_experts if config.router == "attention" else num_experts
    yield Weight(role="router", shape=(router_rows, D))
    yield from _feed_forward("experts", D, F, copies=num_experts, active=config.num_experts_per_tok)
    if config.num_shared_experts:
        yield from _feed_forward("shared_experts", D, config.num_shared_experts * F)


def _feed_forward(role: Role, hidden: int, width: int, *, copies: int = 1, active: int = 1) -> Iterator[Weight]:
    yield Weight(role=role, shape=(2 * width, hidden), copies=copies, active=active)
    yield Weight(role=role, shape=(hidden, width), copies=copies, active=active)


# --- parameters -------------------------------------------------------------------------------------------------------


def parameters(config: ModelConfig) -> dict[Role, int]:
    """Stored parameters by role; their sum is the size of the model."""
    counts = dict.fromkeys(ROLES, 0)
    for weight in weights(config):
        counts[weight.role] += weight.copies * weight.size
    return counts


def active_parameters(config: ModelConfig) -> dict[Role, int]:
    """Active parameters of one token by role: the output head counts once, the embedding look-up not at all."""
    counts = dict.fromkeys(ROLES, 0)
    for weight in weights(config):
        counts[weight.role] += weight.active * weight.size
    return counts


def expected_experts(num_experts: int, num_experts_per_tok: int, tokens: int) -> float:
    """Distinct experts that `tokens` tokens choose on average when routing is uniform: E (1 - (1 - K/E)^tokens)."""
    return num_experts * (1 - (1 - num_experts_per_tok / num_experts) ** tokens)


# --- FLOPs ------------------------------------------------------------------------------------------------------------


def flops_of(weights: Iterable[Weight]) -> int:
    """FLOPs of one token's forward pass through these weights."""
    return 2 * sum(weight.active * weight.size for weight in weights)


def forward_flops(config: ModelConfig) -> int:
    """FLOPs of one token's forward pass without attention scores: two for each active parameter, as the article counts.

    Norms and biases are in it (0.006 % of M32), the router's E x E scores are not (0.001 %).
    """
    return flops_of(weights(config))


def dense_flops(config: ModelConfig) -> int:
    """FLOPs of one token's forward pass in a dense model of this size, in which every parameter is active."""
    used = (weight for weight in weights(config) if weight.role != "embedding")
    return 2 * sum(max(weight.copies, weight.active) * weight.size for weight in used)


def attention_flops(config: ModelConfig, context: float) -> float:
    """FLOPs of one token's attention scores and weighted values over `context` tokens: 2 x 2 C S in each layer."""
    return 4 * config.attention_size * context * config.num_hidden_layers


def training_flops(config: ModelConfig, context: float = 0) -> float:
    """FLOPs of one token forward and backward: three forward passes, each token seeing `context` tokens on average."""
    return 3 * (forward_flops(config) + attention_flops(config, context))


def adapting_flops(config: ModelConfig, factors: float, context: float = 0) -> float:
    """FLOPs of one token forward and backward with frozen weights and `factors` active, trained LoRA weights.

    A frozen matrix is multiplied forward and for the gradient of what it was applied to, not for one of its own.
    """
    return 2 * forward_flops(config) + 3 * attention_flops(config, context) + 6 * factors


def prefill_flops(config: ModelConfig, tokens: int) -> float:
    """FLOPs that read a prompt of `tokens` tokens: causal attention over what came before, the head on the last."""
    head = 2 * active_parameters(config)["head"]
    seen = (tokens + 1) / 2
    return tokens * (forward_flops(config) - head + attention_flops(config, seen)) + head


def petaflops_days(flops: float) -> float:
    """FLOPs in the article's unit of training cost: 10^15 FLOP/s sustained for a day."""
    return flops / (1e15 * SECONDS_PER_DAY)


# --- bytes ------------------------------------------------------------------------------------------------------------

BLOCK_ROWS = 16
SCALE_BYTES = 2
"""The packed layout of quantized matrices (`ops/quantize/groupwise.py`): padded to 16 rows, fp16 scales."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Bits of the matrices of each role; matrices below 16 bits carry one scale for each group of inputs.

    Vectors (norms, biases) stay at 16 bits: they are few, and one value moves a whole channel.
    """

    bits: int
    """The name of the precision: bits of the experts and projections."""
    role_bits: Mapping[Role, int]
    """Roles that differ from `bits`."""
    group_size: int = 64
    """Consecutive inputs that share a scale."""

    def weight_bytes(self, weight: Weight) -> int:
        """Bytes of one copy; codes are packed in blocks of rows and whole groups."""
        bits = self.role_bits.get(weight.role, self.bits)
        if bits == 16 or len(weight.shape) == 1:
            return 2 * weight.size
        rows, columns = weight.shape
        groups = math.ceil(rows / BLOCK_ROWS) * BLOCK_ROWS * math.ceil(columns / self.group_size)
        return groups * (self.group_size * bits // 8 + SCALE_BYTES)


# The router decides by small differences, so it stays whole. Every token passes LFA and head, and together with the
# embedding they are 1.2 % of M32, so they keep 8 bits in the 4-bit model.
PRECISIONS: dict[int, Precision] = {
    16: Precision(bits=16, role_bits={}),
    8: Precision(bits=8, role_bits={"router": 16}),
    4: Precision(bits=4, role_bits={"router": 16, "lfa": 8, "embedding": 8, "head": 8}),
}


def precision(bits: int) -> Precision:
    """The weight precision of that name: 16, 8 or 4. Raises UsageError for another number."""
    if bits not in PRECISIONS:
        raise UsageError(f"{bits} bits: weights are kept in {', '.join(map(str, PRECISIONS))} bits")
    return PRECISIONS[bits]


def weight_bytes(config: ModelConfig, precision: Precision) -> dict[Role, int]:
    """Bytes of the stored weights by role."""
    total = dict.fromkeys(ROLES, 0)
    for weight in weights(config):
        total[weight.role] += weight.copies * precision.weight_bytes(weight)
    return total


def read_bytes(config: ModelConfig, precision: Precision, tokens: int = 1) -> float:
    """Bytes of weights that one pass over `tokens` tokens reads, under uniform routing.

    An expert is read once however many tokens chose it. Embedding rows, one a token, are left out.
    """
    return sum(_copies_read(weight, tokens) * precision.weight_bytes(weight) for weight in weights(config))


def _copies_read(weight: Weight, tokens: int) -> float:
    return expected_experts(weight.copies, weight.active, tokens) if weight.role == "experts" else weight.active


def kv_bytes(config: ModelConfig, kv_bits: int = 16) -> int:
    """Bytes of the keys and values that are stored for one token in all layers; in 8 bits each head has an fp32 scale.

    Raises UsageError for other bits.
    """
    if kv_bits not in (8, 16):
        raise UsageError(f"keys and values in {kv_bits} bits; they are kept in 16 or 8")
    vector = config.head_dim * kv_bits // 8 + (4 if kv_bits == 8 else 0)
    return 2 * config.num_attention_heads * vector * config.num_hidden_layers


def lfa_bytes(config: ModelConfig) -> int:
    """Bytes of LFA state of one sequence in all layers: the last filter input (D) and conv1 output (D/2)."""
    if not config.localized_filtering:
        return 0
    return (config.hidden_size + config.hidden_size // 2) * config.num_hidden_layers * STATE_BYTES


def decode_bytes(
    config: ModelConfig, precision: Precision, *, context: int, batch: int = 1, kv_bits: int = 16
) -> float:
    """Bytes that one decoding step reads: the active weights, and each sequence's keys, values and LFA state."""
    state = context * kv_bytes(config, kv_bits) + lfa_bytes(config)
    return read_bytes(config, precision, batch) + batch * state


# --- the article ------------------------------------------------------------------------------------------------------

FINE_TUNING_TOKENS = 10_000 * 1_024
"""The article's fine-tuning: 10,000 samples of 1,024 tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A model of another team, described by the numbers that the article gives for it."""

    name: str
    forward_flops: float
    """FLOPs a token, inference."""
    training_flops: float
    """FLOPs a token, fine-tuning."""


LLAMA3_70B = Peer(name="Llama-3-70B", forward_flops=140e9, training_flops=420e9)


def fine_tuning_petaflops_days(training_flops_per_token: float) -> float:
    """PetaFLOP/s-days of the article's fine-tuning: 0.0026 for M32, 0.05 for Llama-3-70B."""
    return petaflops_days(FINE_TUNING_TOKENS * training_flops_per_token)
