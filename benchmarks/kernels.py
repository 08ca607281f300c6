"""The compiled kernels at the layer sizes of Yuan 2.0-M32, beside torch's and beside what this machine can do.

    python benchmarks/kernels.py [--threads N] [--runs N] [--only decode|prefill|bf16] > result.json

Decode reads every weight once for one token: GB/s of weights, beside the read bandwidth. Prefill computes 512 tokens:
GOP/s, beside the multiply-adds of int8_peak.cpp. Contenders take turns, each over more weights than caches hold; the
table (stderr) and the JSON (stdout) give the median and the slowest and fastest run.
Legend: O outputs, I inputs, E experts, F expert width, D hidden.
"""

import argparse
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

# Threads that spin while they wait slow each other where other programs run; read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor

from yuanmoe.cli.output import people, print_result, print_table
from yuanmoe.config import preset
from yuanmoe.ops import native
from yuanmoe.ops.packing import PackedFormat
from yuanmoe.ops.quant import PackedTensor
from yuanmoe.plan.machine import read_machine
from yuanmoe.studies.timing import take_turns

GROUP_SIZE = 64
ROTATION_BYTES = 1 << 28
"""Weights that a contender goes through before it meets the first again; eight times this CPU's last cache."""
PREFILL_TOKENS = 512
INT8_TOKENS = 16
"""torch's int8 product is a plain loop on CPUs without VNNI; more tokens would take minutes."""
ROUTED_EXPERTS = 32

M32 = preset("yuan2-m32")
D, F, HC = M32.hidden_size, M32.moe_intermediate_size, M32.attention_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One call and what it gets done: bytes of weights read, or operations."""

    name: str
    call: Callable[[], object]
    amount: float
    unit: str


def random_packed(*shape: int, bits: int) -> PackedTensor:
    """Weights [..., O, I] made directly in the packed layout."""
    *lead, rows, columns = shape
    form = PackedFormat(lead=tuple(lead), rows=rows, columns=columns, bits=bits, group_size=GROUP_SIZE)
    scales = torch.full(form.scales_shape, 0.01, dtype=torch.float16)
    return form.tensor(torch.randint(0, 256, form.codes_shape, dtype=torch.uint8), scales)


def rotation(make: Callable[[], Any], nbytes: Callable[[Any], int]) -> list[Any]:
    """Enough weights that none is in a cache when its turn comes again."""
    weights = [make()]
    while sum(map(nbytes, weights)) < ROTATION_BYTES:
        weights.append(make())
    return weights


def quantized(name: str, *shape: int, bits: int, tokens: int = 1) -> Contender:
    weights = rotation(lambda: random_packed(*shape, bits=bits), lambda weight: weight.nbytes)
    x = torch.randn(tokens, shape[-1])
    return linear_contender(name, weights, lambda weight: native.quantized_linear(x, weight), shape, x)


def linear_contender(
    name: str, weights: list[Any], product: Callable[[Any], object], shape: tuple[int, ...], x: Tensor
) -> Contender:
    """All weights in turn for one token; one of them, another each time, for many."""
    if len(x) == 1:
        total = sum(weight.nbytes for weight in weights)
        return Contender(name=name, call=lambda: [product(w) for w in weights], amount=total, unit="GB/s")
    turn = cycle(weights)
    operations = 2 * len(x) * shape[-2] * shape[-1]
    return Contender(name=name, call=lambda: product(next(turn)), amount=operations, unit="GOP/s")


def int4_of_torch(name: str, rows: int, columns: int, tokens: int = 1) -> Contender:
    def make() -> Tensor:
        codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)

    x = torch.randn(tokens, columns).bfloat16()
    scales = torch.rand(columns // GROUP_SIZE, rows, 2).bfloat16()
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    weights = rotation(make, lambda weight: weight.nbytes)
    return linear_contender(name, weights, lambda w: multiply(x, w, GROUP_SIZE, scales), (rows, columns), x)


def int8_of_torch(name: str, rows: int, columns: int) -> Contender:
    x = torch.randint(-127, 128, (INT8_TOKENS, columns), dtype=torch.int8)
    weight = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
    return linear_contender(name, [weight], lambda w: torch._int_mm(x, w.T), (rows, columns), x)


def dense(name: str, rows: int, columns: int, dtype: torch.dtype, tokens: int, *, ours: bool) -> Contender:
    weights = rotation(lambda: torch.randn(rows, columns).to(dtype), lambda weight: weight.nbytes)
    x = torch.randn(tokens, columns).to(dtype)
    multiply = native.bf16_linear if ours else torch.nn.functional.linear
    return linear_contender(name, weights, lambda weight: multiply(x, weight), (rows, columns), x)


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


def reading() -> Contender:
    kernels, data = native.kernels(native.variant()), torch.ones(ROTATION_BYTES, dtype=torch.uint8)
    return Contender(name="read bandwidth", call=lambda: kernels.read(data), amount=data.nbytes, unit="GB/s")


def decode() -> list[Contender]:
    return [
        reading(),
        quantized(f"attention [{HC}, {D}] 4 bits", HC, D, bits=4),
        quantized(f"gate_up [{2 * F}, {D}] 4 bits", 2 * F, D, bits=4),
        quantized(f"down [{D}, {F}] 4 bits", D, F, bits=4),
        quantized(f"head [{M32.vocab_size}, {D}] 8 bits", M32.vocab_size, D, bits=8),
        mixture("two experts 4 bits", *packed_experts(16), native.quantized_moe),
        int4_of_torch(f"torch int4 [{2 * F}, {D}]", 2 * F, D),
        int4_of_torch(f"torch int4 [{D}, {F}]", D, F),
    ]


def packed_experts(count: int) -> tuple[PackedTensor, PackedTensor]:
    return random_packed(count, 2, F, D, bits=4), random_packed(count, D, F, bits=4)


def prefill() -> list[Contender]:
    return [
        quantized(f"attention [{HC}, {D}] 4 bits", HC, D, bits=4, tokens=PREFILL_TOKENS),
        quantized(f"down [{D}, {F}] 4 bits", D, F, bits=4, tokens=PREFILL_TOKENS),
        quantized(f"attention [{HC}, {D}] 8 bits", HC, D, bits=8, tokens=PREFILL_TOKENS),
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


def int8_peak(threads: int, runs: int) -> list[float]:
    """Operations a second without memory, compiled here; empty without g++ or a CPU it knows."""
    source = Path(__file__).with_name("int8_peak.cpp")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peak"
        try:
            subprocess.run(["g++", "-O2", "-pthread", source, "-o", program], check=True)
            output = subprocess.run([program, str(threads), str(runs)], check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError):
            return []
    return sorted(float(line) for line in output.stdout.split())


def measure(name: str, contenders: list[Contender], runs: int) -> dict[str, dict[str, Any]]:
    timings = take_turns({c.name: c.call for c in contenders}, runs)
    result = {c.name: {"unit": c.unit, **timings[c.name].rate(c.amount / 1e9)} for c in contenders}
    rows = [[key, *(f"{row[at]:.1f}" for at in ("median", "min", "max")), row["unit"]] for key, row in result.items()]
    print_table(people(), name, ["", "median", "slowest", "fastest", ""], rows)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--only", choices=("decode", "prefill", "bf16"))
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
        "int8_peak_gops": int8_peak(options.threads, options.runs),
    }
    for name, make in (("decode", decode), ("prefill", prefill), ("bf16", bf16)):
        if options.only in (None, name):
            result[name] = measure(name, make(), options.runs)
    print_result(result)


if __name__ == "__main__":
    main()
