"""The compiled kernels at the layer sizes of Yuan 2.0-M32, beside torch's and beside what this machine can do.

    python benchmarks/kernels.py [--threads N] [--runs N] [--only decode|prefill|bf16|attention] > result.json

Decode reads every weight once for one token: GB/s of weights, beside the read bandwidth. Prefill computes 512 tokens:
GOP/s, beside the most 8-bit multiply-adds that the CPU can do. Attention reads the keys and values of one sequence for
one query: GB/s of them. Contenders take turns, each over more weights than
caches hold; the table (stderr) and the JSON (stdout) give the median and the slowest and fastest run.
Legend: O outputs, I inputs, E experts, F expert width, D hidden.
"""

import argparse
import os
from collections.abc import Callable
from typing import Any

# Threads that spin while they wait slow each other where other programs run; read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor

from yuanmoe.bench.products import (
    Contender,
    int4_of_torch,
    linear_contender,
    measure_contenders,
    multiply_adds,
    packed_format,
    quantized_contender,
    reading,
    rotation,
)
from yuanmoe.bench.synthetic import random_packed
from yuanmoe.cli.terminal.output import people, print_result, print_table
from yuanmoe.ops import native
from yuanmoe.ops.quantize.groupwise import PackedTensor
from yuanmoe.plan.device.machine import read_machine
from yuanmoe.presets import preset

PREFILL_TOKENS = 512
INT8_TOKENS = 16
"""torch's int8 product is a plain loop on CPUs without VNNI; more tokens would take minutes."""
ROUTED_EXPERTS = 32

M32 = preset("yuan2-m32")
D, F, HC = M32.hidden_size, M32.moe_intermediate_size, M32.attention_size


def int8_of_torch(name: str, rows: int, columns: int) -> Contender:
    x = torch.randint(-127, 128, (INT8_TOKENS, columns), dtype=torch.int8)
    weight = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
    return linear_contender(name, [weight], lambda w: torch._int_mm(x, w.T), (rows, columns), INT8_TOKENS)


def dense(name: str, rows: int, columns: int, dtype: torch.dtype, tokens: int, *, ours: bool) -> Contender:
    weights = rotation(lambda: torch.randn(rows, columns).to(dtype), lambda weight: weight.nbytes)
    x = torch.randn(tokens, columns).to(dtype)
    multiply = native.bf16_linear if ours else torch.nn.functional.linear
    return linear_contender(name, weights, lambda weight: multiply(x, weight), (rows, columns), tokens)


def mixture(name: str, gate_up: Any, down: Any, step: Callable[..., object], tokens: int = 1) -> Contender:
    """Two experts a token; single tokens go through all experts of the stack, two by two."""
    experts = gate_up.shape[0] if isinstance(gate_up, Tensor) else gate_up.codes.shape[0]
    x, shares = torch.randn(tokens, D), torch.tensor([[0.6, 0.4]]).expand(tokens, 2)
    if tokens == 1:
        pairs = torch.randperm(experts).view(-1, 1, 2).unbind()
        total = gate_up.nbytes + down.nbytes
        call = lambda: [step(x, gate_up, down, shares, pair) for pair in pairs]  # noqa: E731
        return Contender(name=name, call=call, amount=total, unit="GB/s")
    ids = torch.rand(tokens, experts).topk(2).indices
    operations = 2 * tokens * 2 * 3 * F * D
    return Contender(name=name, call=lambda: step(x, gate_up, down, shares, ids), amount=operations, unit="GOP/s")


def decode() -> list[Contender]:
    return [
        reading(),
        quantized_contender(f"attention [{HC}, {D}] 4 bits", HC, D, bits=4),
        quantized_contender(f"gate_up [{2 * F}, {D}] 4 bits", 2 * F, D, bits=4),
        quantized_contender(f"down [{D}, {F}] 4 bits", D, F, bits=4),
        quantized_contender(f"head [{M32.vocab_size}, {D}] 8 bits", M32.vocab_size, D, bits=8),
        mixture("two experts 4 bits", *packed_experts(16), native.quantized_moe),
        int4_of_torch(f"torch int4 [{2 * F}, {D}]", 2 * F, D),
        int4_of_torch(f"torch int4 [{D}, {F}]", D, F),
    ]


def packed_experts(count: int) -> tuple[PackedTensor, PackedTensor]:
    gate_up, down = packed_format(count, 2, F, D, bits=4), packed_format(count, D, F, bits=4)
    return random_packed(gate_up), random_packed(down)


def prefill() -> list[Contender]:
    peak = multiply_adds()
    return [
        *([peak] if peak else []),
        quantized_contender(f"attention [{HC}, {D}] 4 bits", HC, D, bits=4, tokens=PREFILL_TOKENS),
        quantized_contender(f"down [{D}, {F}] 4 bits", D, F, bits=4, tokens=PREFILL_TOKENS),
        quantized_contender(f"attention [{HC}, {D}] 8 bits", HC, D, bits=8, tokens=PREFILL_TOKENS),
        mixture("32 experts 4 bits", *packed_experts(ROUTED_EXPERTS), native.quantized_moe, PREFILL_TOKENS),
        int4_of_torch(f"torch int4 [{HC}, {D}]", HC, D, tokens=PREFILL_TOKENS),
        dense(f"torch float32 [{HC}, {D}]", HC, D, torch.float32, PREFILL_TOKENS, ours=False),
        int8_of_torch(f"torch int8 [{HC}, {D}], {INT8_TOKENS} tokens", HC, D),
    ]


def bf16() -> list[Contender]:
    experts = torch.randn(8, 2 * F, D).bfloat16(), torch.randn(8, D, F).bfloat16()
    return [
        reading(),
        dense(f"attention [{HC}, {D}]", HC, D, torch.bfloat16, 1, ours=True),
        mixture("two experts", *experts, native.bf16_moe),
        dense(f"torch bf16 [{HC}, {D}]", HC, D, torch.bfloat16, 1, ours=False),
    ]


def attention_of(name: str, context: int, dtype: torch.dtype, *, page: int | None = None) -> Contender:
    """One query of all heads over keys and values that are stored whole, or in pages that lie anywhere."""
    H, C = M32.num_attention_heads, M32.head_dim
    slots = page or context
    shape = (context // slots, H, slots, C)

    def make() -> tuple[Tensor, ...]:
        return tuple(torch.randn(shape).to(dtype) for _ in range(2))

    caches = rotation(make, lambda pair: 2 * pair[0].nbytes)
    scales = (torch.ones(shape[:-1]), torch.ones(shape[:-1])) if dtype == torch.int8 else None
    pages = torch.randperm(shape[0], dtype=torch.int32)[None] if page else None
    q = torch.randn(1, H, C)
    return Contender(
        name=name,
        call=lambda: [native.attention(q, *pair, [context - 1], [1], scales, pages) for pair in caches],
        amount=len(caches) * 2 * caches[0][0].nbytes,
        unit="GB/s",
    )


def attention_of_torch(name: str, context: int) -> Contender:
    shape = (1, M32.num_attention_heads, context, M32.head_dim)
    caches = rotation(lambda: torch.randn(2, *shape).bfloat16().unbind(), lambda pair: 2 * pair[0].nbytes)
    q = torch.randn(1, M32.num_attention_heads, 1, M32.head_dim).bfloat16()
    attend = torch.nn.functional.scaled_dot_product_attention
    amount = len(caches) * 2 * caches[0][0].nbytes
    return Contender(name=name, call=lambda: [attend(q, *pair) for pair in caches], amount=amount, unit="GB/s")


def attention() -> list[Contender]:
    return [
        reading(),
        attention_of("bf16, 512 tokens", 512, torch.bfloat16),
        attention_of("bf16, 2,048 tokens", 2048, torch.bfloat16),
        attention_of("bf16, 2,048 tokens in pages of 32", 2048, torch.bfloat16, page=32),
        attention_of("int8, 2,048 tokens", 2048, torch.int8),
        attention_of_torch("torch bf16, 2,048 tokens", 2048),
    ]


def report(name: str, contenders: list[Contender], runs: int) -> dict[str, dict[str, Any]]:
    result = measure_contenders(contenders, runs)
    rows = [[key, *(f"{row[at]:.1f}" for at in ("median", "min", "max")), row["unit"]] for key, row in result.items()]
    print_table(people(), name, ["", "median", "slowest", "fastest", ""], rows)
    return result


SECTIONS = {"decode": decode, "prefill": prefill, "bf16": bf16, "attention": attention}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--only", choices=tuple(SECTIONS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    machine = read_machine()
    result: dict[str, Any] = {
        "cpu": machine.cpu,
        "load": machine.load,
        "threads": options.threads,
        "variant": native.variant(),
        "torch": torch.__version__,
    }
    for name, make in SECTIONS.items():
        if options.only in (None, name):
            result[name] = report(name, make(), options.runs)
    print_result(result)


if __name__ == "__main__":
    main()
