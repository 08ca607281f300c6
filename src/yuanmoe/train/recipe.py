"""What a training run is: the model, the batches, the optimizer and the budget, as one frozen object.

Sources of the defaults: spec 6.2 (AdamW, betas, clipping, initialization as published). `nano` is ours; how its numbers
were found is beside them. Not here: data, devices, files.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from yuanmoe.config import ModelConfig, preset
from yuanmoe.errors import ConfigError

_POSITIVE = (
    *("sequence_length", "batch_size", "learning_rate", "embedding_rate", "head_rate", "embedding_std"),
    *("gradient_clip", "max_tokens", "max_seconds"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything a run depends on besides its data. Raises ConfigError when the numbers describe no run."""

    model: ModelConfig
    sequence_length: int
    """Tokens of a window; each predicts the next one."""
    batch_size: int
    """Windows in a step."""
    learning_rate: float
    """At its highest, after the warm-up."""
    embedding_rate: float = 1.0
    """Learning rate of the embedding, as a multiple."""
    head_rate: float = 1.0
    """Learning rate of an output head of its own, as a multiple."""
    embedding_std: float | None = None
    """Spread of the embedding's random start; by default that of all matrices (initializer_range)."""
    warmup: float = 0.05
    """Share of the budget in which the learning rate rises, linearly, from 0."""
    final_learning_rate: float = 0.1
    """Where the learning rate ends, as a share of its highest."""
    weight_decay: float = 0.1
    """Of matrices; norms, biases and the embedding have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_clip: float = 1.0
    """Longest gradient, as the norm over all parameters."""
    max_tokens: int | None = None
    """Budget in tokens; with `max_seconds` the first of both that runs out ends the run."""
    max_seconds: float | None = None
    """Budget in seconds, measurements on held-out text included."""
    measurements: int = 8
    """Times that the loss on held-out text is measured."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value}; it must be a number above 0")
        for name in ("warmup", "final_learning_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it is a share, from 0 to 1")
        if self.max_tokens is None and self.max_seconds is None:
            raise ConfigError("a run needs an end: give max_tokens, max_seconds or both")
        if self.sequence_length > self.model.max_position_embeddings:
            raise ConfigError(
                f"sequence_length {self.sequence_length} exceeds the model's context of "
                f"{self.model.max_position_embeddings} (max_position_embeddings)"
            )

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.sequence_length

    def replace(self, **changes: Any) -> "Recipe":
        """The same recipe with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {"model": self.model.to_dict(), "betas": list(self.betas)}


def nano(**changes: Any) -> Recipe:
    """A model that learns to write recognisable Python in two minutes on two CPU cores; `changes` are fields.

    Bits a byte in the comments are of held-out text after the same time of one core, see docs/log.md.
    """
    recipe = Recipe(
        model=preset("nano"),
        # Short windows: 64 x 16 tokens are less alike than 128 x 8 (1.30 against 1.36), and rotating half of each head
        # lets the model read past what it was trained on (1.21 over 256 tokens).
        sequence_length=64,
        batch_size=16,
        learning_rate=4e-3,
        # AdamW moves every weight by about its learning rate, whatever the weight's size. From the published start,
        # N(0, 0.02) everywhere, the first steps of the layers drown the embedding they are added to, tokens look alike
        # to the router, and most choose the same experts: after 80 k tokens 2.7, no better than token frequencies.
        # An embedding as large as what the layers add, and faster where each weight rarely gets a gradient: 2.1.
        embedding_std=1.0,
        embedding_rate=20.0,
        head_rate=5.0,
        final_learning_rate=0.05,
        max_seconds=120.0,
    )
    return recipe.replace(**changes)
