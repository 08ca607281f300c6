"""Whether a model fits a device, and how fast it can run there: the memory it takes and the roofline above its speed.

A pass takes at least the time of reading its bytes and at least the time of its FLOPs; the larger of both is the bound.
The prediction below it is explained beside `EXPECTED_SHARE` and `LAYER_S`. Not here: counting (`cost.py`), measuring
(`machine.py`), several devices together.
"""

import bisect
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from yuanmoe.config import ModelConfig
from yuanmoe.errors import UsageError
from yuanmoe.plan import cost
from yuanmoe.plan.activations import activation_bytes
from yuanmoe.plan.cost import PRECISIONS, Precision
from yuanmoe.plan.device.devices import DEVICES, Device
from yuanmoe.units import GIB

RUNTIME_BYTES = GIB
"""Python, torch and allocator slack: torch alone takes 0.25 GiB on a CPU, a CUDA context about 0.5 GiB."""

PREFILL_TOKENS = 2048
"""Prompt tokens that pass through the model at once; longer prompts go in pieces."""

SHORTEST_CONTEXT = 256
"""A context below this is no remedy: question and answer must fit."""

EXPECTED_SHARE = {"bandwidth": 0.8, "compute": 0.5}
"""Share of the bound that kernels are predicted to reach, by what limits them. Bandwidth: with `LAYER_S` it gives
29.6 ms for a token through two M32 layers in bf16 on two Zen 3 cores, where 30.9 were measured (docs/log.md). Compute,
and all of other devices, is a guess."""

LAYER_S = 0.5e-3
"""Seconds that a layer takes however small it is, in Python and in starting kernels; 0.5 to 0.8 ms measured with
torch 2.13 on a Zen 3 core. It limits small models, and large ones on fast devices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of memory that running a model takes, by purpose."""

    weights: int
    kv_cache: int
    lfa_state: int
    activations: int
    runtime: int = RUNTIME_BYTES

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.lfa_state + self.activations + self.runtime


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Tokens a second over all sequences: the roofline bound, and the expected speed below it."""

    bound: float
    predicted: float
    limited_by: Literal["bandwidth", "compute"]
    """What the bound comes from."""
    bytes_read: float
    """Of one pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The work of a device: a model, the bits of its weights, and a number of sequences with a context length each.

    Raises UsageError when there is nothing to run.
    """

    config: ModelConfig
    bits: int
    context: int
    """Tokens of one sequence, prompt and answer."""
    batch: int = 1
    kv_bits: int = 16
    """Of cached keys and values: 16 or 8."""
    stored: Precision | None = None
    """Of a checkpoint that is quantized already; otherwise what `bits` stands for."""

    def __post_init__(self) -> None:
        cost.precision(self.bits)
        cost.kv_bytes(self.config, self.kv_bits)
        for name in ("context", "batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def precision(self) -> Precision:
        return self.stored or PRECISIONS[self.bits]

    def with_bits(self, bits: int) -> "Workload":
        """This workload with weights that are quantized again."""
        return dataclasses.replace(self, bits=bits, stored=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """What to change in the command so that the model fits, such as `--bits 4 --context 2048`."""

    options: str
    total_bytes: int


def memory(load: Workload) -> Memory:
    """Bytes of a load with every sequence at its full context."""
    tokens = max(min(load.context, PREFILL_TOKENS), load.batch)
    return Memory(
        weights=sum(cost.weight_bytes(load.config, load.precision).values()),
        kv_cache=load.batch * load.context * cost.kv_bytes(load.config, load.kv_bits),
        lfa_state=load.batch * cost.lfa_bytes(load.config),
        activations=activation_bytes(load.config, tokens, load.batch),
    )


def fits(load: Workload, device: Device) -> bool:
    return memory(load).total <= device.memory_bytes


def highest_bits(config: ModelConfig, device: Device, *, context: int, batch: int = 1) -> int:
    """The most bits with which the model fits the device, or the fewest there are if none does."""
    ordered = sorted(PRECISIONS, reverse=True)
    loads = (Workload(config=config, bits=bits, context=context, batch=batch) for bits in ordered)
    return next((load.bits for load in loads if fits(load, device)), ordered[-1])


def workload_of(
    config: ModelConfig, stored: Precision | None, device: Device, *, context: int, batch: int = 1, kv_bits: int = 16
) -> Workload:
    """A model as it is stored, or where it is not quantized yet with the most bits that fit."""
    bits = min(stored.role_bits.values()) if stored else highest_bits(config, device, context=context, batch=batch)
    return Workload(config=config, bits=bits, context=context, batch=batch, kv_bits=kv_bits, stored=stored)


def decode_speed(load: Workload, device: Device, context: int | None = None) -> Speed:
    """Speed of one token for every sequence, each having seen `context` tokens (by default the load's full context)."""
    seen = load.context if context is None else context
    bytes_read = cost.decode_bytes(load.config, load.precision, context=seen, batch=load.batch, kv_bits=load.kv_bits)
    flops = load.batch * (cost.forward_flops(load.config) + cost.attention_flops(load.config, seen))
    return _roofline(load, device, load.batch, bytes_read, flops)


def prefill_speed(load: Workload, device: Device) -> Speed | None:
    """Speed of reading a prompt, one piece of it; None where the device's matmul rate, which limits it, is unknown."""
    if device.peak_flops(load.bits) is None:
        return None
    tokens = min(load.context, PREFILL_TOKENS)
    bytes_read = cost.read_bytes(load.config, load.precision, tokens)
    return _roofline(load, device, tokens, bytes_read, cost.prefill_flops(load.config, tokens))


def _roofline(load: Workload, device: Device, tokens: int, bytes_read: float, flops: float) -> Speed:
    """Speed of one pass over so many tokens."""
    peak = device.peak_flops(load.bits)
    read_s = bytes_read / device.bandwidth
    compute_s = flops / peak if peak else 0.0
    bound_s = max(read_s, compute_s)
    limited_by = "compute" if compute_s > read_s else "bandwidth"
    return Speed(
        bound=tokens / bound_s,
        predicted=tokens / (bound_s / EXPECTED_SHARE[limited_by] + load.config.num_hidden_layers * LAYER_S),
        limited_by=limited_by,
        bytes_read=bytes_read,
    )


def device_remedies(load: Workload, device: Device) -> list[Remedy]:
    """Changes that make the load fit: one alone if that is enough, each as small as possible; empty when it fits."""
    if fits(load, device):
        return []
    fewest = min(PRECISIONS)
    found = [
        _largest_that_fits(load, device, "bits", sorted(bits for bits in PRECISIONS if bits < load.bits)),
        *_shorter_or_fewer(load, device),
    ]
    if not any(found) and load.bits > fewest:
        found = _shorter_or_fewer(load.with_bits(fewest), device)
    changes = [_remedy(load, lighter) for lighter in found if lighter is not None]
    return [*changes, *_smallest_device(load)]


def _shorter_or_fewer(load: Workload, device: Device) -> list[Workload | None]:
    return [
        _largest_that_fits(load, device, "context", range(SHORTEST_CONTEXT, load.context)),
        _largest_that_fits(load, device, "batch", range(1, load.batch)),
    ]


def _largest_that_fits(load: Workload, device: Device, field: str, values: Sequence[int]) -> Workload | None:
    """The load with the largest of `values` in one field; they ascend, and memory with them."""

    def with_value(value: int) -> Workload:
        return load.with_bits(value) if field == "bits" else dataclasses.replace(load, **{field: value})

    count = bisect.bisect_left(values, True, key=lambda value: not fits(with_value(value), device))
    return with_value(values[count - 1]) if count else None


def _remedy(asked: Workload, lighter: Workload) -> Remedy:
    changed = [name for name in ("bits", "context", "batch") if getattr(lighter, name) != getattr(asked, name)]
    options = " ".join(f"--{name} {getattr(lighter, name)}" for name in changed)
    return Remedy(options=options, total_bytes=memory(lighter).total)


def _smallest_device(load: Workload) -> list[Remedy]:
    large_enough = [device for device in DEVICES.values() if fits(load, device)]
    if not large_enough:
        return []
    smallest = min(large_enough, key=lambda device: device.memory_bytes)
    return [Remedy(options=f"--device {smallest.name}", total_bytes=memory(load).total)]
