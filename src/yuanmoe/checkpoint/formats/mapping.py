"""Where the numbers of our tensors are in the official layout, and back: the only place that knows both.

In the official files q_proj and k_proj are the halves of one matrix whose rows alternate between queries and keys head
by head, experts are separate matrices, convolutions keep their taps last, and a dense `up_proj` is the half that SiLU
is applied to (spec 1.3, 1.4, 1.8 to 1.10, 3.1 to 3.3). Both layouts hold the same numbers, so the whole mapping is one
list of spans, read in either direction; what comes back is bit for bit what went in.

Architectures that were never released get natural names: `mlp.gate.weight` for a linear router, `mlp.gate.bias` for
what balances one, `mlp.shared_experts.w1` / `.w2` for shared experts; a layer without filtering has no `lf_gate`.
Legend: D hidden, C = heads x head_dim, E experts, F expert width, I dense width, V vocabulary, S shared experts.
Not here: config.json (`official_config.py`), Megatron's names (`megatron.py`), packed weights (`gptq.py`).
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import NamedTuple

from yuanmoe.checkpoint.files.lazy import ComposedTensor, LazyTensor, TensorPart
from yuanmoe.checkpoint.formats.native_config import WEIGHT_DTYPES
from yuanmoe.config import ModelConfig
from yuanmoe.errors import CheckpointError

Shape = tuple[int, ...]

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


class Span(NamedTuple):
    """`size` elements that are consecutive in both layouts' flattened tensors."""

    native: str
    native_start: int
    official: str
    official_start: int
    size: int

    @property
    def native_stop(self) -> int:
        return self.native_start + self.size

    @property
    def official_stop(self) -> int:
        return self.official_start + self.size


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorLayout:
    """All tensors of a model under both names: their shapes, and the spans that cover each side exactly once."""

    native: dict[str, Shape] = field(default_factory=dict)
    official: dict[str, Shape] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)

    def join(self, native: str, shape: Shape, officials: Mapping[str, Shape]) -> None:
        """A native tensor that is official ones one after the other."""
        self.native[native] = shape
        start = 0
        for name, official_shape in officials.items():
            self.official[name] = official_shape
            self.spans.append(Span(native, start, name, 0, math.prod(official_shape)))
            start += math.prod(official_shape)

    def rename(self, native: str, shape: Shape, official: str | None = None) -> None:
        """A native tensor that is an official one as it is."""
        self.join(native, shape, {official or native: shape})

    def interleave(self, prefix: str, heads: int, head_dim: int, hidden: int) -> None:
        """Queries and keys: the official pair joined is, head by head, head_dim rows of Q and head_dim rows of K."""
        block = head_dim * hidden
        for name in ("q_proj", "k_proj"):
            self.native[f"{prefix}.{name}.weight"] = (heads * head_dim, hidden)
            self.official[f"{prefix}.{name}.weight"] = (heads * head_dim, hidden)
        for head in range(heads):
            for role, native in enumerate(("q_proj", "k_proj")):
                half, position = divmod(2 * head + role, heads)
                official = f"{prefix}.{('q_proj', 'k_proj')[half]}.weight"
                self.spans.append(Span(f"{prefix}.{native}.weight", head * block, official, position * block, block))


def layout(config: ModelConfig) -> TensorLayout:
    """The tensors of a model of this configuration; the head only where it is not the embedding."""
    table = TensorLayout()
    D, V = config.hidden_size, config.vocab_size
    table.rename(EMBEDDING, (V, D))
    for index, experts in enumerate(config.experts_per_layer):
        prefix = f"model.layers.{index}"
        table.rename(f"{prefix}.input_layernorm.weight", (D,))
        _attention(table, f"{prefix}.self_attn", config)
        table.rename(f"{prefix}.post_attention_layernorm.weight", (D,))
        if experts:
            _experts(table, f"{prefix}.mlp", config, experts)
        else:
            _dense(table, f"{prefix}.mlp", D, config.intermediate_size)
    table.rename("model.norm.weight", (D,))
    if not config.tie_word_embeddings:
        table.rename(HEAD, (V, D))
    return table


def _attention(table: TensorLayout, prefix: str, config: ModelConfig) -> None:
    D, C = config.hidden_size, config.attention_size
    if config.localized_filtering:
        for conv, outputs, inputs in (("conv1", D // 2, D), ("conv2", D, D // 2)):
            ours, official = f"{prefix}.lfa.{conv}", f"{prefix}.lf_gate.{conv}"
            # Same numbers in each row, transposed: [input, tap] there, [tap, input] here.
            table.join(f"{ours}.weight", (outputs, 2 * inputs), {f"{official}.weight": (outputs, inputs, 2, 1)})
            table.rename(f"{ours}.bias", (outputs,), f"{official}.bias")
        table.rename(f"{prefix}.lfa.norm.weight", (D,), f"{prefix}.lf_gate.output_layernorm.weight")
    table.interleave(prefix, config.num_attention_heads, config.head_dim, D)
    table.rename(f"{prefix}.v_proj.weight", (C, D))
    table.rename(f"{prefix}.o_proj.weight", (D, C))


def _experts(table: TensorLayout, prefix: str, config: ModelConfig, experts: int) -> None:
    D, F, E = config.hidden_size, config.moe_intermediate_size, experts
    if config.router == "attention":
        parts = {f"{prefix}.gate.{role}.weight": (E, D) for role in ("query", "key", "value")}
        table.join(f"{prefix}.router.weight", (3 * E, D), parts)
    else:
        table.rename(f"{prefix}.router.weight", (E, D), f"{prefix}.gate.weight")
    if config.router_bias:
        table.rename(f"{prefix}.router.bias", (E,), f"{prefix}.gate.bias")
    ups = {f"{prefix}.experts.{expert}.w1.weight": (2 * F, D) for expert in range(E)}
    downs = {f"{prefix}.experts.{expert}.w2.weight": (D, F) for expert in range(E)}
    table.join(f"{prefix}.experts.gate_up_proj", (E, 2 * F, D), ups)
    table.join(f"{prefix}.experts.down_proj", (E, D, F), downs)
    if config.num_shared_experts:
        width = config.num_shared_experts * F
        shared = f"{prefix}.shared_experts"
        table.rename(f"{shared}.gate_up_proj.weight", (2 * width, D), f"{shared}.w1.weight")
        table.rename(f"{shared}.down_proj.weight", (D, width), f"{shared}.w2.weight")


def _dense(table: TensorLayout, prefix: str, hidden: int, width: int) -> None:
    # Official `up_proj` is the half with SiLU, so it comes first.
    halves = {f"{prefix}.{name}.weight": (width, hidden) for name in ("up_proj", "gate_proj")}
    table.join(f"{prefix}.gate_up_proj.weight", (2 * width, hidden), halves)
    table.rename(f"{prefix}.down_proj.weight", (hidden, width))


def to_native(table: TensorLayout, official: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Every native tensor, lazily, out of the official ones."""
    placed = [
        (span.native, span.native_start, TensorPart(official[span.official], span.official_start, span.official_stop))
        for span in table.spans
    ]
    sources = {span.native: table.official[span.official] for span in table.spans}
    taps = {name: (shape[1], 2) for name, shape in sources.items() if len(shape) == 4}
    return _composed(table.native, placed, taps)


def to_official(table: TensorLayout, native: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Every official tensor, lazily, out of the native ones."""
    placed = [
        (span.official, span.official_start, TensorPart(native[span.native], span.native_start, span.native_stop))
        for span in table.spans
    ]
    taps = {name: (2, shape[1]) for name, shape in table.official.items() if len(shape) == 4}
    return _composed(table.official, placed, taps)


def _composed(
    shapes: Mapping[str, Shape], placed: Iterable[tuple[str, int, TensorPart]], taps: Mapping[str, tuple[int, int]]
) -> dict[str, LazyTensor]:
    parts: dict[str, list[tuple[int, TensorPart]]] = defaultdict(list)
    for name, start, part in placed:
        parts[name].append((start, part))
    return {
        name: ComposedTensor.of(shape, [part for _, part in sorted(parts[name], key=itemgetter(0))], taps.get(name))
        for name, shape in shapes.items()
    }


def check_tensors(
    place: object, expected: Mapping[str, Shape], stored: Mapping[str, LazyTensor], optional: str = ""
) -> None:
    """Raise CheckpointError unless `stored`, found at `place`, are the expected tensors, with dtypes of weights."""
    missing = [name for name in expected if name not in stored]
    if missing:
        raise CheckpointError(
            f"{place}: tensor {missing[0]!r} is missing ({len(missing)} of {len(expected)} in all); "
            "the files are incomplete, or config.json belongs to another model"
        )
    for name, shape in expected.items():
        found = stored[name]
        if found.shape != shape:
            raise CheckpointError(f"{place}: tensor {name!r} has shape {found.shape}, config.json describes {shape}")
        if found.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{place}: tensor {name!r} has dtype {found.dtype}; weights are floating-point numbers"
            )
    extra = [name for name in stored if name not in expected and name != optional]
    if extra:
        raise CheckpointError(
            f"{place}: tensor {extra[0]!r} is not part of the model that config.json describes ({len(extra)} in all); "
            "if it can be left out, go on without it: ignore_unknown=True, or yuanmoe convert --ignore-unknown"
        )
