"""A whole quantized model at work for one user or a few: decoding and prefill beside what this machine can do.

Decoding reads every weight at work once a token, so its bound is the read bandwidth; prefill computes, its bound are
8-bit multiply-adds. Bounds are measured in turns with what they bound. Contexts are not computed: caches hold noise.
Legend: B sequences.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch

from yuanmoe.bench.products import layer_beside_torch, measure_contenders, multiply_adds, reading
from yuanmoe.bench.timing import Timing, take_turns
from yuanmoe.config import ModelConfig
from yuanmoe.errors import ResourceError
from yuanmoe.model.decoder import CausalLM
from yuanmoe.model.state.cache import Cache
from yuanmoe.plan import cost
from yuanmoe.plan.activations import activation_bytes
from yuanmoe.plan.cost import Precision
from yuanmoe.plan.device.machine import read_machine
from yuanmoe.units import GIB, format_size

OTHER_BYTES = GIB
"""torch itself, and what is measured beside the model."""
DECODE_RUNS = 5
"""Decode steps for each run of a prefill: they are short, and other programs disturb them more."""
ROUTED_STEPS = 8
"""Steps over which the experts at work are counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSettings:
    """What is measured."""

    contexts: Sequence[int] = (16, 512, 2048)
    """Tokens that a sequence has before the step."""
    batches: Sequence[int] = (1,)
    """Sequences at once: the first at every context, others at the shortest one, which takes the least memory."""
    prompts: Sequence[int] = (32, 128, 512)
    kv_dtype: torch.dtype = torch.bfloat16
    runs: int = 5

    @property
    def kv_bits(self) -> int:
        return 8 * self.kv_dtype.itemsize

    @property
    def steps(self) -> list[tuple[int, int]]:
        """Batch and context of every decoding that is measured."""
        first, *others = self.batches
        return [(first, context) for context in self.contexts] + [(batch, min(self.contexts)) for batch in others]

    @property
    def rooms(self) -> dict[int, int]:
        """Slots of a sequence in the cache of each batch; the prompts go through the first."""
        rooms = {self.batches[0]: max(self.prompts)}
        for batch, context in self.steps:
            rooms[batch] = max(rooms.get(batch, 1), context + 1)
        return rooms


def check_decode_settings(
    name: str, config: ModelConfig, precision: Precision, load: DecodeSettings, free: int | None = None
) -> None:
    """Raises ContextLengthError, or ResourceError with the numbers, before anything of it is in memory.

    `free` is what this machine has free unless given.
    """
    Cache(config, 1, max(load.rooms.values()), dtype=torch.float32, device="meta")
    free = read_machine().available_bytes if free is None else free
    needed = _needed_bytes(config, precision, load)
    if free is None or needed <= free:
        return
    layers = range(config.num_hidden_layers - 1, 0, -1)
    fit = (n for n in layers if _needed_bytes(config.replace(num_hidden_layers=n), precision, load) <= free)
    raise ResourceError(
        f"{name} with {config.num_hidden_layers} layers in {precision.bits} bits needs {format_size(needed)}: "
        f"{format_size(sum(cost.weight_bytes(config, precision).values()))} of weights, "
        f"{format_size(_cache_bytes(config, load))} of keys and values; {format_size(free)} are free. "
        f"Take fewer layers (--layers {next(fit, 1)}), bits, sequences or shorter contexts"
    )


def _needed_bytes(config: ModelConfig, precision: Precision, load: DecodeSettings) -> int:
    weights = sum(cost.weight_bytes(config, precision).values())
    activations = 2 * activation_bytes(config, max(load.prompts), 1)  # counted in 16 bits, computed in 32
    return weights + _cache_bytes(config, load) + activations + OTHER_BYTES


def _cache_bytes(config: ModelConfig, load: DecodeSettings) -> int:
    return cost.kv_bytes(config, load.kv_bits) * sum(batch * room for batch, room in load.rooms.items())


@torch.inference_mode()
def measure_decode(
    model: CausalLM, precision: Precision, load: DecodeSettings, on_run: Callable[[str, float], None] | None = None
) -> dict[str, Any]:
    """Rates of decoding and prefill with their spread, bounds and memory; `model` is quantized."""
    config = model.config
    caches = {batch: _filled_cache(model, batch, room, load.kv_dtype) for batch, room in load.rooms.items()}
    steps = {f"{batch} x {context}": _step(model, caches[batch], context) for batch, context in load.steps}
    experts = [_experts_at_work(model, caches[batch], context) for batch, context in load.steps]
    prompts = {f"prompt of {tokens}": _prefill(model, caches[load.batches[0]], tokens) for tokens in load.prompts}
    resident = resident_bytes()
    read, peak = reading(), multiply_adds()
    timings = take_turns({read.name: read.call} | steps, DECODE_RUNS * load.runs, on_run)
    bandwidth = timings[read.name].rate(read.amount)
    bounds = {peak.name: peak.call} if peak else {}
    prefills = take_turns(bounds | prompts, load.runs, on_run)
    rate = prefills[peak.name].rate(peak.amount) if peak else None
    decode = [
        _decode_report(config, precision, load, batch, context, timings[f"{batch} x {context}"], bandwidth)
        | {"experts_read": at_work, "experts_read_if_uniform": _uniform(config, batch)}
        for (batch, context), at_work in zip(load.steps, experts, strict=True)
    ]
    return {
        "resident_bytes": resident,
        "read_bytes_per_s": bandwidth,
        "decode": decode,
        "int8_operations_per_s": rate,
        "prefill": [_prefill_report(config, n, prefills[f"prompt of {n}"], rate) for n in load.prompts],
    }


def beside_torch(config: ModelConfig, tokens: int, runs: int) -> dict[str, Any] | None:
    """Our 4-bit products of one layer beside torch's for `tokens` tokens: rates, and how many times as fast ours are.

    None where torch cannot compute them.
    """
    contenders = layer_beside_torch(config, tokens)
    if contenders is None:
        return None
    rates = measure_contenders((*contenders, reading()) if tokens == 1 else contenders, runs)
    return {"tokens": tokens, **rates, "speed_against_torch": rates["yuanmoe"]["median"] / rates["torch"]["median"]}


def resident_bytes() -> int | None:
    """Memory of this process that is in RAM; None where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def _filled_cache(model: CausalLM, batch: int, room: int, kv_dtype: torch.dtype) -> Cache:
    model.kv_dtype = kv_dtype
    cache = model.new_cache(batch, room)
    first = cache.keys[0]
    first.values.random_(-127, 128) if first.scales is not None else first.values.uniform_(-1, 1)
    for slots in (*cache.keys, *cache.values):
        slots.values.copy_(first.values)
        if slots.scales is not None:
            slots.scales.fill_(1 / 127)
    return cache


def _step(model: CausalLM, cache: Cache, context: int) -> Callable[[], Any]:
    """One token of each sequence behind `context` others: forward pass and the choice of the next."""

    def step() -> Any:
        B = len(cache.lengths)
        cache.lengths = [context] * B
        ids = torch.randint(model.config.vocab_size, (B,))
        hidden, routings = model.model(ids, cache.extend([1] * B))
        model.logits(hidden).argmax(dim=-1).tolist()
        return routings

    return step


def _prefill(model: CausalLM, cache: Cache, tokens: int) -> Callable[[], Any]:
    """A prompt of one sequence, up to the choice of the first token."""

    def prefill() -> None:
        B = len(cache.lengths)
        cache.lengths = [0] * B
        ids = torch.randint(model.config.vocab_size, (tokens,))
        hidden, _ = model.model(ids, cache.extend([tokens] + [0] * (B - 1)))
        model.logits(hidden[-1:]).argmax(dim=-1).tolist()

    return prefill


def _experts_at_work(model: CausalLM, cache: Cache, context: int) -> float | None:
    """Distinct experts that a step reads in a layer, on average; None in a dense model."""
    step = _step(model, cache, context)
    counts = [len(routing.experts.unique()) for _ in range(ROUTED_STEPS) for routing in step()]
    return mean(counts) if counts else None


def _uniform(config: ModelConfig, batch: int) -> float | None:
    routed = [experts for experts in config.experts_per_layer if experts]
    if not routed:
        return None
    return mean(cost.expected_experts(experts, config.num_experts_per_tok, batch) for experts in routed)


def _decode_report(
    config: ModelConfig,
    precision: Precision,
    load: DecodeSettings,
    batch: int,
    context: int,
    timing: Timing,
    bandwidth: dict[str, float],
) -> dict[str, Any]:
    nbytes = cost.decode_bytes(config, precision, context=context, batch=batch, kv_bits=load.kv_bits)
    rate = timing.rate(nbytes)
    return {
        "batch": batch,
        "context": context,
        **timing.to_dict(),
        "tokens_per_s": timing.rate(batch),
        "bytes": nbytes,
        "bytes_per_s": rate,
        "share_of_read_bandwidth": rate["median"] / bandwidth["median"],
    }


def _prefill_report(config: ModelConfig, tokens: int, timing: Timing, peak: dict[str, float] | None) -> dict[str, Any]:
    operations = cost.prefill_flops(config, tokens)
    rate = timing.rate(operations)
    return {
        "tokens": tokens,
        "time_to_first_token_s": timing.to_dict(),
        "tokens_per_s": timing.rate(tokens),
        "operations": operations,
        "operations_per_s": rate,
        "share_of_int8_peak": rate["median"] / peak["median"] if peak else None,
    }
