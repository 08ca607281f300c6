"""What a training run is, as one frozen object: model, batches, optimizer, schedule, balance of experts, and the run.

Sources of the defaults: spec 6.2 (AdamW, betas, decay, clipping, cosine as published). Recipes with names are in
`recipes.py`. Not here: data, devices, files.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from yuanmoe.config import ModelConfig
from yuanmoe.data.loader.loader import MaskRule
from yuanmoe.errors import ConfigError
from yuanmoe.model.lora.targets import LoraSettings

Precision = Literal["float32", "bfloat16"]
MOST_SEED = 2**63 - 1
"""What generators of random numbers take."""

Shape = Literal["cosine", "constant", "wsd"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """What one step reads."""

    section: ClassVar[str] = "data"

    sequence_length: int
    """Tokens of a window; each predicts the next one."""
    batch_size: int
    """Windows in a step."""
    micro_batch_size: int | None = None
    """Windows at a time; their gradients are summed in float32. By default the whole batch."""
    fim_rate: float = 0.0
    """Share of documents that are rearranged to fill in the middle; those with a loss mask stay as they are."""
    fim_spm_rate: float = 0.5
    """Share of those whose suffix comes before their prefix."""
    loss_mask: MaskRule = "stored"
    """`stored` beside the tokens, where there is one, or `official`: the released rule (spec 6.3)."""

    def __post_init__(self) -> None:
        _positive(self, "sequence_length", "batch_size", "micro_batch_size")
        _shares(self, "fim_rate", "fim_spm_rate")
        _choice(self, "loss_mask", MaskRule)
        if self.batch_size % self.windows_at_once:
            raise ConfigError(
                f"data.batch_size {self.batch_size} is no multiple of data.micro_batch_size {self.micro_batch_size}"
            )

    @property
    def windows_at_once(self) -> int:
        return self.micro_batch_size or self.batch_size

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.sequence_length


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """AdamW (arXiv 1711.05101) and the gradient that it gets."""

    section: ClassVar[str] = "optimizer"

    learning_rate: float
    """At its highest, after the warm-up."""
    embedding_rate: float = 1.0
    """Learning rate of the embedding, as a multiple."""
    head_rate: float = 1.0
    """Learning rate of an output head of its own, as a multiple."""
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """Of the matrices inside the layers. Norms and biases never decay."""
    decay_embedding: bool = False
    """Whether embedding and head decay too: the released training does (Megatron spares vectors alone)."""
    gradient_clip: float = 1.0
    """Longest gradient, as the norm over all parameters."""

    def __post_init__(self) -> None:
        _positive(self, "learning_rate", "embedding_rate", "head_rate", "epsilon", "gradient_clip")
        _not_negative(self, "weight_decay")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas are {self.betas}; they must be two numbers from 0 to below 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleSettings:
    """How long the run is, and its learning rate on the way, as shares of the budget."""

    section: ClassVar[str] = "schedule"

    shape: Shape = "cosine"
    """After the warm-up: half a `cosine` down, `constant`, or `wsd`: constant, then a line down (arXiv 2404.06395)."""
    warmup: float = 0.05
    """Share of the budget in which the learning rate rises, linearly, from 0."""
    decay: float = 0.2
    """Share of the budget, at its end, in which `wsd` falls."""
    final_learning_rate: float = 0.1
    """Where `cosine` and `wsd` end, as a share of the highest."""
    max_tokens: int | None = None
    """Budget in tokens; with `max_seconds` the first of both that runs out ends the run."""
    max_seconds: float | None = None
    """Budget in seconds, measurements on held-out text included. Such a run does not repeat bit for bit."""

    def __post_init__(self) -> None:
        _choice(self, "shape", Shape)
        _shares(self, "warmup", "decay", "final_learning_rate")
        _positive(self, "max_tokens", "max_seconds")
        if self.max_tokens is None and self.max_seconds is None:
            raise ConfigError("a run needs an end: give schedule.max_tokens, schedule.max_seconds or both")
        if self.shape == "wsd" and self.warmup + self.decay > 1:
            raise ConfigError(
                f"schedule.warmup {self.warmup} and schedule.decay {self.decay} are more than the whole budget"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceSettings:
    """What keeps experts evenly at work; nothing by default, as published (spec 1.8). See `balance.py`."""

    section: ClassVar[str] = "balance"

    auxiliary_loss: float = 0.0
    """Weight of the load-balancing loss of every layer (arXiv 2101.03961)."""
    z_loss: float = 0.0
    """Weight of the squared size of the router's logits (arXiv 2202.08906)."""
    bias_rate: float = 0.0
    """Step of the loss-free bias of every expert (arXiv 2408.15664: 0.001); needs model.router_bias."""

    def __post_init__(self) -> None:
        _not_negative(self, "auxiliary_loss", "z_loss", "bias_rate")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """How the run computes, what it measures and what it keeps."""

    section: ClassVar[str] = "run"

    seed: int = 0
    """Of the weights at the start, the order of the text, and dropout."""
    dtype: Precision = "float32"
    """Of weights and activations; `bfloat16` keeps float32 masters, moments and sums of gradients."""
    embedding_std: float | None = None
    """Spread of the embedding's random start; by default that of all matrices (initializer_range)."""
    activation_checkpointing: bool = False
    """Compute every layer again in the backward pass instead of keeping what it made."""
    compile: bool = False
    """Let torch compile the layers (docs/training.md says where it helps)."""
    milestones: int = 8
    """Times, at even shares of the budget, that the run is measured on held-out text, writes a sample and is saved."""
    checkpoint_steps: int | None = None
    """Steps between checkpoints beside those of the milestones."""
    keep_last: int = 2
    """Newest checkpoints that are kept, beside the one with the lowest held-out loss."""
    spike: float | None = 2.0
    """Nats above the mean of the last steps at which a loss stops the run; none goes on."""
    prompts: tuple[str, ...] = ()
    """Beginnings of the samples."""
    sample_tokens: int = 48

    def __post_init__(self) -> None:
        _choice(self, "dtype", Precision)
        _positive(self, "embedding_std", "milestones", "checkpoint_steps", "keep_last", "spike", "sample_tokens")
        _not_negative(self, "seed")
        if self.seed > MOST_SEED:
            raise ConfigError(f"run.seed is {self.seed:,}; it must be at most {MOST_SEED:,} (2^63 - 1)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything a run depends on besides its data. Raises ConfigError when the numbers describe no run."""

    model: ModelConfig
    data: DataSettings
    optimizer: OptimizerSettings
    schedule: ScheduleSettings
    balance: BalanceSettings = field(default_factory=BalanceSettings)
    run: RunSettings = field(default_factory=RunSettings)
    lora: LoraSettings | None = None
    """With it the model is a frozen base, and only factors beside its matrices learn (`adapt.py`)."""

    def __post_init__(self) -> None:
        if self.data.sequence_length > self.model.max_position_embeddings:
            raise ConfigError(
                f"data.sequence_length {self.data.sequence_length} exceeds the model's context of "
                f"{self.model.max_position_embeddings} (model.max_position_embeddings)"
            )
        balance = self.balance
        if max(balance.auxiliary_loss, balance.z_loss, balance.bias_rate) and not self.model.is_moe:
            raise ConfigError("a model without experts has nothing to balance; set all of balance to 0")
        if balance.bias_rate and not self.model.router_bias:
            raise ConfigError(
                f"balance.bias_rate {balance.bias_rate} moves biases that the model lacks; set model.router_bias=true"
            )
        if balance.bias_rate and self.lora is not None:
            raise ConfigError(
                f"balance.bias_rate {balance.bias_rate} moves biases of the base, which LoRA leaves alone; set it to 0"
            )

    def replace(self, section: str, **changes: Any) -> "Recipe":
        """The same recipe with some fields of one section changed."""
        changed = dataclasses.replace(getattr(self, section), **changes)
        return dataclasses.replace(self, **{section: changed})

    def extend_context(self, length: int) -> "Recipe":
        """The same recipe for windows of `length` tokens, with the NTK-aware RoPE base for them.

        Raises ConfigError for a length below the model's context.
        """
        data = dataclasses.replace(self.data, sequence_length=length)
        return dataclasses.replace(self, model=self.model.extend_context(length), data=data)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, section by section; without `lora` where everything learns."""
        sections = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values = {name: dataclasses.asdict(section) for name, section in sections.items() if section is not None}
        return {
            section: {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
            for section, fields in values.items()
        }


def _positive(settings: Any, *names: str) -> None:
    """Raise ConfigError unless these fields are numbers above 0, or None."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{settings.section}.{name} is {value}; it must be a number above 0")


def _not_negative(settings: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(settings, name) < math.inf:
            raise ConfigError(f"{settings.section}.{name} is {getattr(settings, name)}; it must be a number from 0 on")


def _shares(settings: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(settings, name) <= 1:
            raise ConfigError(f"{settings.section}.{name} is {getattr(settings, name)}; it is a share, from 0 to 1")


def _choice(settings: Any, name: str, kind: Any) -> None:
    value = getattr(settings, name)
    if value not in get_args(kind):
        raise ConfigError(f"{settings.section}.{name} is {value!r}; it must be one of {', '.join(get_args(kind))}")
