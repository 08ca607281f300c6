"""What a Yuan model is: its sizes, its router, its filtering, as one frozen object.

Sources: arXiv 2311.15786 (Yuan 2.0, LFA) and arXiv 2405.17976 (Yuan 2.0-M32, Attention Router).
Field names are the Hugging Face ecosystem's; Yuan's own keys are translated in `checkpoint/formats/mapping.py`.
Not here: the released models by name (`presets.py`), tensors (no torch), files, training hyper-parameters.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from yuanmoe.errors import ConfigError
from yuanmoe.hints import did_you_mean

RouterKind = Literal["attention", "linear", "shared-expert"]
RopeAngles = Literal["float32", "bfloat16"]
Packing = Literal["continuous", "megatron", "hf-mask", "isolated"]
SPECIAL_TOKENS = ("eod_token_id", "sep_token_id", "pad_token_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything the arithmetic depends on. Raises ConfigError when the numbers describe no model."""

    vocab_size: int
    """Rows of the embedding, padding rows included (135,040 for 134,953 pieces)."""
    hidden_size: int
    """Width of the residual stream."""
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    """Channels of one head; heads times head_dim may exceed hidden_size (M32: 16 x 256 over 2048)."""
    intermediate_size: int = 0
    """Width of the dense feed-forward network; used by layers with no experts."""
    num_experts: int | tuple[int, ...] = 0
    """Routed experts in every layer, or one number a layer; 0 is a dense feed-forward network."""
    num_experts_per_tok: int = 2
    """Routed experts at work for one token."""
    moe_intermediate_size: int = 0
    """Width of one expert."""
    num_shared_experts: int = 0
    """Experts that every token passes, outside the routing; for `router="shared-expert"` only."""
    router: RouterKind = "attention"
    """`attention` (arXiv 2405.17976 section 3), `linear` (the classical router), or
    `shared-expert` (linear, beside experts that every token passes)."""
    router_bias: bool = False
    """Whether every expert has a bias that counts in the choice of experts and not in their weights
    (loss-free balance, arXiv 2408.15664); the released models have none."""
    localized_filtering: bool = True
    """Whether queries and keys see the input through LFA (arXiv 2311.15786 section 3)."""
    partial_rotary_factor: float = 1.0
    """Share of each head that rotates, from its first channel on (0.5 for M32)."""
    rope_theta: float = 10000.0
    """Base of the rotary angles: 10000 in pre-training, 40890 in the 16K fine-tuning of M32."""
    rope_angles: RopeAngles = "float32"
    """Precision of positions and angles; `bfloat16` repeats the rounding of the released HF code."""
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    """Whether the output head is the input embedding."""
    max_position_embeddings: int = 4096
    """Longest context in tokens."""
    packing: Packing = "continuous"
    """What restarts after `<eod>` inside one sequence: nothing (`continuous`), positions (`megatron`: the released
    training), the attention mask (`hf-mask`: the released HF code with reset_attention_mask), or attention,
    positions and LFA (`isolated`)."""
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    eod_token_id: int = 77185
    """`<eod>`: ends a document and an answer."""
    sep_token_id: int = 77187
    """`<sep>`: ends a question."""
    pad_token_id: int = 77185

    def __post_init__(self) -> None:
        if isinstance(self.num_experts, list):
            object.__setattr__(self, "num_experts", tuple(self.num_experts))
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        _choice("router", self.router, RouterKind)
        _choice("rope_angles", self.rope_angles, RopeAngles)
        _choice("packing", self.packing, Packing)
        self._check_experts()
        if self.localized_filtering and self.hidden_size % 2:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is odd; LFA's first convolution has hidden_size / 2 rows"
            )
        if not 0 < self.partial_rotary_factor <= 1 or self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ConfigError(
                f"partial_rotary_factor {self.partial_rotary_factor} rotates {self.rotary_dim} of {self.head_dim} "
                "channels; it must give an even number of at least 2"
            )
        if not 1 < self.rope_theta < math.inf:
            raise ConfigError(f"rope_theta is {self.rope_theta}; it must be above 1")
        for name in ("rms_norm_eps", "initializer_range"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.max_position_embeddings < 1:
            raise ConfigError(f"max_position_embeddings is {self.max_position_embeddings}; it must be at least 1")
        if not 0 <= self.attention_dropout < 1:
            raise ConfigError(f"attention_dropout is {self.attention_dropout}; it must be in [0, 1)")
        for name in SPECIAL_TOKENS:
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ConfigError(f"{name} {getattr(self, name)} is outside the vocabulary of {self.vocab_size}")

    def _check_experts(self) -> None:
        if isinstance(self.num_experts, tuple) and len(self.num_experts) != self.num_hidden_layers:
            raise ConfigError(
                f"num_experts lists {len(self.num_experts)} layers, the model has {self.num_hidden_layers}; "
                "give one number, or one a layer"
            )
        for layer, count in enumerate(self.experts_per_layer):
            if count == 0 and self.intermediate_size < 1:
                raise ConfigError(f"layer {layer} has no experts, so intermediate_size must be at least 1")
            if count and self.moe_intermediate_size < 1:
                raise ConfigError(f"layer {layer} has {count} experts, so moe_intermediate_size must be at least 1")
            if count and not 1 <= self.num_experts_per_tok <= count:
                raise ConfigError(
                    f"top-k {self.num_experts_per_tok} is outside 1..{count} experts "
                    f"of layer {layer} (num_experts_per_tok)"
                )
        if (self.router == "shared-expert") != (self.num_shared_experts > 0):
            raise ConfigError(
                f"router {self.router!r} with num_shared_experts {self.num_shared_experts}: "
                'shared experts and router="shared-expert" go together'
            )

    @property
    def experts_per_layer(self) -> tuple[int, ...]:
        """Routed experts of each layer, [num_hidden_layers]."""
        if isinstance(self.num_experts, tuple):
            return self.num_experts
        return (self.num_experts,) * self.num_hidden_layers

    @property
    def is_moe(self) -> bool:
        return any(self.experts_per_layer)

    @property
    def attention_size(self) -> int:
        """Width of queries, keys and values: heads times head_dim."""
        return self.num_attention_heads * self.head_dim

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that rotate."""
        return round(self.head_dim * self.partial_rotary_factor)

    def replace(self, **changes: Any) -> "ModelConfig":
        """The same configuration with some fields changed. Raises ConfigError for an unknown field."""
        _known(changes)
        return dataclasses.replace(self, **changes)

    def extend_context(self, length: int) -> "ModelConfig":
        """The same model for contexts of `length` tokens, with the NTK-aware RoPE base b s^(R / (R - 2)) for s times
        the length and R rotated channels (arXiv 2405.17976 section 4.2), rounded as there: 4096 to 16384 is 40890.

        Raises ConfigError for a length below the context, and for 2 rotated channels, which no base spreads.
        """
        if length < self.max_position_embeddings:
            raise ConfigError(f"a context of {length} tokens is below the model's {self.max_position_embeddings}")
        if self.rotary_dim <= 2:
            raise ConfigError(f"a model that rotates {self.rotary_dim} channels has no RoPE base for longer contexts")
        factor = length / self.max_position_embeddings
        theta = float(round(self.rope_theta * factor ** (self.rotary_dim / (self.rotary_dim - 2))))
        return self.replace(max_position_embeddings=length, rope_theta=theta)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        return {
            field.name: list(value) if isinstance(value := getattr(self, field.name), tuple) else value
            for field in dataclasses.fields(self)
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`. Raises ConfigError for an unknown, missing or mistyped key."""
        _known(values)
        for field in dataclasses.fields(cls):
            if field.default is dataclasses.MISSING and field.name not in values:
                raise ConfigError(f"config key {field.name} is missing")
            if field.name in values:
                _typed(field.name, field.type, values[field.name])
        return cls(**values)


FIELD_NAMES = tuple(field.name for field in dataclasses.fields(ModelConfig))


def _known(values: dict[str, Any]) -> None:
    for key in values:
        if key not in FIELD_NAMES:
            hint = did_you_mean(key, FIELD_NAMES, otherwise=f"known keys: {', '.join(FIELD_NAMES)}")
            raise ConfigError(f"unknown config key {key!r}; {hint}")


def _typed(name: str, expected: Any, value: Any) -> None:
    if expected is bool:
        fits = isinstance(value, bool)
    elif expected is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
    elif expected is int:
        fits = isinstance(value, int) and not isinstance(value, bool)
    elif name == "num_experts":
        entries = value if isinstance(value, list | tuple) else [value]
        fits = all(isinstance(entry, int) and not isinstance(entry, bool) for entry in entries)
    else:
        fits = isinstance(value, str)
    if not fits:
        wanted = getattr(expected, "__name__", str(expected))
        raise ConfigError(f"config key {name} is {value!r}; it must be of type {wanted}")


def _choice(name: str, value: str, kind: Any) -> None:
    if value not in get_args(kind):
        raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(get_args(kind))}")
