"""Contenders that multiply by one layer's weights: our kernels and torch's, over more weights than caches hold.

Legend: N tokens, O outputs, I inputs.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from yuanmoe.bench.synthetic import random_packed
from yuanmoe.bench.timing import take_turns
from yuanmoe.config import ModelConfig
from yuanmoe.ops import native
from yuanmoe.ops.quantize.packed_format import PackedFormat

GROUP_SIZE = 64
ROTATION_BYTES = 1 << 28
"""Weights that a contender goes through before it meets the first again; eight times the last cache of most CPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One call and what it gets done: bytes of weights read, or operations."""

    name: str
    call: Callable[[], object]
    amount: float
    unit: str


def measure_contenders(contenders: Iterable[Contender], runs: int) -> dict[str, dict[str, Any]]:
    """What each gets done in 10^9 a second, in turns: median, slowest and fastest run, and its unit."""
    named = {contender.name: contender for contender in contenders}
    timings = take_turns({name: contender.call for name, contender in named.items()}, runs)
    return {name: {"unit": c.unit, **timings[name].rate(c.amount / 1e9)} for name, c in named.items()}


def packed_format(*shape: int, bits: int) -> PackedFormat:
    """Matrices [..., O, I] in groups of 64."""
    *lead, rows, columns = shape
    return PackedFormat(lead=tuple(lead), rows=rows, columns=columns, bits=bits, group_size=GROUP_SIZE)


def rotation(make: Callable[[], Any], nbytes: Callable[[Any], int], total: int = ROTATION_BYTES) -> list[Any]:
    """Enough weights that none is in a cache when its turn comes again."""
    weights = [make()]
    while sum(map(nbytes, weights)) < total:
        weights.append(make())
    return weights


def linear_contender(
    name: str, weights: list[Any], product: Callable[[Any], object], shape: tuple[int, ...], tokens: int
) -> Contender:
    """All weights in turn for one token; one of them, another each time, for many."""
    if tokens == 1:
        total = sum(weight.nbytes for weight in weights)
        return Contender(name=name, call=lambda: [product(weight) for weight in weights], amount=total, unit="GB/s")
    turn = cycle(weights)
    operations = 2 * tokens * shape[-2] * shape[-1]
    return Contender(name=name, call=lambda: product(next(turn)), amount=operations, unit="GOP/s")


def quantized_contender(name: str, *shape: int, bits: int, tokens: int = 1) -> Contender:
    """Our product with a quantized matrix."""
    form, x = packed_format(*shape, bits=bits), torch.randn(tokens, shape[-1])
    weights = rotation(lambda: random_packed(form), lambda weight: weight.nbytes)
    return linear_contender(name, weights, lambda weight: native.quantized_linear(x, weight), shape, tokens)


def int4_of_torch(name: str, rows: int, columns: int, tokens: int = 1) -> Contender:
    """torch's product with a 4-bit matrix and bfloat16 tokens."""
    weights = rotation(lambda: _torch_int4(rows, columns), lambda weight: weight.nbytes)
    product = _torch_int4_product(columns, rows, tokens)
    return linear_contender(name, weights, product, (rows, columns), tokens)


def reading() -> Contender:
    """Memory read by all threads, as fast as it can be."""
    kernels, data = native.kernels(native.variant()), torch.ones(ROTATION_BYTES, dtype=torch.uint8)
    return Contender(name="read bandwidth", call=lambda: kernels.read(data), amount=data.nbytes, unit="GB/s")


def multiply_adds(rounds: int = 1_000_000) -> Contender | None:
    """8-bit multiply-adds in registers, as many as this CPU can do; None where only plain C++ runs."""
    kernels = native.kernels(native.variant())
    amount = 2 * kernels.multiply_adds(rounds)
    call = lambda: kernels.multiply_adds(rounds)  # noqa: E731
    return Contender(name="int8 peak", call=call, amount=amount, unit="GOP/s") if amount else None


def layer_beside_torch(config: ModelConfig, tokens: int) -> tuple[Contender, Contender] | None:
    """The 4-bit matrices that a token needs in one layer, each times `tokens` tokens: ours and torch's int4 product.

    None where torch's takes none of these shapes, or this torch has it no more.
    """
    D, C, F = config.hidden_size, config.attention_size, config.moe_intermediate_size or config.intermediate_size
    experts = config.num_experts_per_tok if config.is_moe else 1
    shapes = [(C, D)] * 3 + [(D, C)] + [(2 * F, D), (D, F)] * experts
    if not _has_torch_int4() or any(rows % 32 or columns % GROUP_SIZE for rows, columns in shapes):
        return None
    ours = [
        [(shape[1], random_packed(packed_format(*shape, bits=4))) for shape in shapes] for _ in range(_layers(shapes))
    ]
    theirs = [
        [(_torch_int4_product(columns, rows, tokens), _torch_int4(rows, columns)) for rows, columns in shapes]
        for _ in ours
    ]
    x = {columns: torch.randn(tokens, columns) for _, columns in shapes}
    our_turn, their_turn = cycle(ours), cycle(theirs)
    operations = 2 * tokens * sum(rows * columns for rows, columns in shapes)
    amount, unit = (sum(w.nbytes for _, w in ours[0]), "GB/s") if tokens == 1 else (operations, "GOP/s")
    return (
        Contender(
            name="yuanmoe",
            call=lambda: [native.quantized_linear(x[columns], weight) for columns, weight in next(our_turn)],
            amount=amount,
            unit=unit,
        ),
        Contender(
            name="torch",
            call=lambda: [product(weight) for product, weight in next(their_turn)],
            amount=amount,
            unit=unit,
        ),
    )


def _layers(shapes: list[tuple[int, int]]) -> int:
    """How many layers are more than caches hold, as both contenders pass through them; of small models not even 16."""
    return min(16, -(-ROTATION_BYTES // sum(rows * columns for rows, columns in shapes)))


def _has_torch_int4() -> bool:
    return hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")


def _torch_int4(rows: int, columns: int) -> Tensor:
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)


def _torch_int4_product(columns: int, rows: int, tokens: int) -> Callable[[Tensor], Tensor]:
    x = torch.randn(tokens, columns).bfloat16()
    scales = torch.rand(columns // GROUP_SIZE, rows, 2).bfloat16()
    return lambda weight: torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, GROUP_SIZE, scales)
