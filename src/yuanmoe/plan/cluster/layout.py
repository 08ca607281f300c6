"""How a training step is laid out over devices: data, pipeline and expert parallelism, sharding, and checkpointing.

A layout reads `dp12 pp8 ep4 optimizer mb2 full`: 12 data ranks times 8 stages, experts spread over 4 of the data ranks,
the optimizer's state sharded over the data ranks, 2 sequences in a micro-batch, layers computed again in the backward
pass. Not here: what that takes (`parts.py`) and which is best (`search.py`).
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from yuanmoe.config import ModelConfig
from yuanmoe.errors import UsageError
from yuanmoe.plan import cost
from yuanmoe.plan.activations import CHECKPOINTING, Checkpointing
from yuanmoe.plan.cluster.split import Demand, split

Sharding = Literal["replicated", "optimizer", "fsdp"]
"""What data ranks share: nothing, masters and moments (the paper's optimizer parallelism), or weights and gradients
too."""

SHARDING: tuple[Sharding, ...] = get_args(Sharding)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStep:
    """What is trained, one step of it. Raises UsageError when there is nothing to do."""

    config: ModelConfig
    sequence_length: int
    global_batch: int
    """Sequences of a step."""

    def __post_init__(self) -> None:
        for name, value in (("sequence length", self.sequence_length), ("global batch", self.global_batch)):
            if value < 1:
                raise UsageError(f"{name} is {value}; it must be at least 1")

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.global_batch * self.sequence_length


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Who does what."""

    data: int
    """Ranks that see different sequences."""
    stages: int
    """Of the pipeline."""
    experts: int
    """Data ranks that together hold all experts."""
    sharding: Sharding
    micro_batch: int
    """Sequences that pass through the pipeline together."""
    checkpointing: Checkpointing
    layers: tuple[int, ...] = ()
    """Of each stage, where a list was chosen; no word says it."""

    @property
    def words(self) -> tuple[str, ...]:
        """As people write it."""
        numbers = (f"dp{self.data}", f"pp{self.stages}", f"ep{self.experts}")
        return (*numbers, self.sharding, f"mb{self.micro_batch}", self.checkpointing)

    def accumulation(self, training: TrainingStep) -> int:
        """Micro-batches that each pipeline sees in a step."""
        return training.global_batch // (self.data * self.micro_batch)


def layouts(training: TrainingStep, devices: int) -> Iterator[Layout]:
    """Every layout of so many devices; micro-batches are powers of two."""
    for stages in _divisors(devices, training.config.num_hidden_layers):
        data = devices // stages
        for experts in _expert_ranks(training.config, data):
            for sharding in SHARDING if data > 1 else SHARDING[:1]:
                for micro_batch in _micro_batches(training.global_batch, data):
                    for checkpointing in CHECKPOINTING:
                        yield Layout(
                            data=data,
                            stages=stages,
                            experts=experts,
                            sharding=sharding,
                            micro_batch=micro_batch,
                            checkpointing=checkpointing,
                        )


def find_layouts(training: TrainingStep, devices: int, words: Iterable[str] = ()) -> list[Layout]:
    """The layouts that have all of these words. Raises UsageError, with what there is, when there are none."""
    every = list(layouts(training, devices))
    if not every:
        stages = max(_divisors(devices, training.config.num_hidden_layers))
        raise UsageError(
            f"a global batch of {training.global_batch} cannot be shared equally by {devices} devices: with up to "
            f"{stages} pipeline stages there are at least {devices // stages} data ranks; "
            f"take a multiple of {devices // stages}"
        )
    wanted = set(words)
    for word in sorted(wanted):
        _check_word(word, every, devices)
    found = [layout for layout in every if wanted <= {*layout.words}]
    if not found:
        raise UsageError(f"no layout of {devices} devices is {' '.join(words)} at once; leave out a word")
    return found


def balanced_stages(config: ModelConfig, count: int) -> tuple[int, ...]:
    """Layers of each of `count` stages: the slowest has the fewest FLOPs, and of such lists early stages the fewest
    layers, because they hold more micro-batches.

    Raises UsageError for a count outside 1 to the number of layers. `search.py` knows better lists for given devices.
    """
    num_layers = config.num_hidden_layers
    if not 1 <= count <= num_layers:
        raise UsageError(f"{count} pipeline stages cannot share {num_layers} layers; there can be 1 to {num_layers}")
    _, head, _ = cost.outside_weights(config)
    demand = Demand(
        layer_bytes=[0.0] * num_layers,
        layer_kept=[1.0] * num_layers,
        layer_s=[cost.flops_of(cost.layer_weights(config, experts)) for experts in config.experts_per_layer],
        stage_bytes=[0.0] * count,
        stage_s=[0.0] * (count - 1) + [cost.flops_of([head])],
        in_flight=range(count, 0, -1),
    )
    return split(demand, limit_bytes=2.0 * count * num_layers)


def read_stages(text: str) -> tuple[int, ...]:
    """Layers of each stage, as people write them. Raises UsageError for what is no list of numbers."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"stages {text!r} is not a list of numbers such as 2,3,3,2") from error


def check_stages(stages: Sequence[int], config: ModelConfig, devices: int) -> None:
    """Raises UsageError for a list of stages that this model or so many devices cannot have."""
    num_layers, said = config.num_hidden_layers, ",".join(map(str, stages))
    if not stages or min(stages) < 1:
        raise UsageError(f"stages {said}: each needs at least one layer")
    if sum(stages) != num_layers:
        raise UsageError(f"stages {said} have {sum(stages)} layers together; the model has {num_layers}")
    if devices % len(stages):
        counts = ", ".join(map(str, _divisors(devices, num_layers)))
        raise UsageError(f"{devices} devices are not a multiple of {len(stages)} stages; there can be {counts} stages")


def check_expert_ranks(ranks: int, config: ModelConfig) -> None:
    """Raises UsageError where so many ranks cannot share the experts of every layer equally."""
    if ranks > 1 and not config.is_moe:
        raise UsageError(f"there are {ranks} expert ranks and no experts; a dense model has 1")
    for layer, count in enumerate(config.experts_per_layer):
        if count % ranks:
            possible = ", ".join(map(str, _expert_ranks(config, max(config.experts_per_layer))))
            raise UsageError(
                f"{ranks} expert ranks cannot share the {count} experts of layer {layer} equally; "
                f"there can be {possible}"
            )


def _check_word(word: str, every: list[Layout], devices: int) -> None:
    known = {known: None for layout in every for known in layout.words}
    if word in known:
        return
    kind = re.match(r"[a-z]*", word)
    assert kind is not None, "no letters match too"
    alike = [other for other in known if re.fullmatch(rf"{kind[0]}\d+", other)] if word[-1:].isdigit() else []
    raise UsageError(f"no layout of {devices} devices has {word!r}; there are {', '.join(alike or known)}")


def _divisors(number: int, most: int) -> list[int]:
    return [divisor for divisor in range(1, min(number, most) + 1) if number % divisor == 0]


def _expert_ranks(config: ModelConfig, data: int) -> list[int]:
    counts = [count for count in config.experts_per_layer if count]
    if not counts:
        return [1]
    return [ranks for ranks in _divisors(data, min(counts)) if all(count % ranks == 0 for count in counts)]


def _micro_batches(global_batch: int, data: int) -> Iterator[int]:
    if global_batch % data:
        return
    size = 1
    while global_batch // data % size == 0:
        yield size
        size *= 2
