"""One training step of a few layers at M32's sizes beside transformers' Mixtral with grouped_mm; and `small` alone.

    python benchmarks/train_step.py --runs 5                 # two layers, 512 tokens, bfloat16: needs 16 GiB
    python benchmarks/train_step.py --layers 1               # 8 GiB
    python benchmarks/train_step.py --small                  # share of the matmul peak, with a profile

A step is forward, loss and backward, and plain gradient descent: AdamW's moments of these layers would not fit beside
them, and are the same work for both. The contenders take turns on the very same expert weights; each gives its
gradients back before the other begins. Peak memory is that of a step of each in a process of its own.
Not asserted anywhere: a machine that does other things gives other numbers.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Threads that spin while they wait slow each other where other programs run; read when torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
import torch.nn.functional as F

from yuanmoe.bench.layers import build, build_mixtral, cut
from yuanmoe.bench.timing import take_turns
from yuanmoe.model.decoder import CausalLM
from yuanmoe.plan import cost
from yuanmoe.presets import preset
from yuanmoe.train.recipe.recipe import BalanceSettings
from yuanmoe.train.recipe.recipes import small
from yuanmoe.train.start.model import new_model
from yuanmoe.train.steps.meter import flops_per_token
from yuanmoe.train.steps.optim import Optimizer
from yuanmoe.train.steps.step import Windows, learn

RATE = 1e-6
MIB = 1 << 20


def descend(model: torch.nn.Module) -> None:
    """Plain gradient descent, parameter by parameter, and the gradients' memory back."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.add_(parameter.grad, alpha=-RATE)
                parameter.grad = None


def our_step(model: CausalLM, windows: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        learn(model, Windows(windows), len(windows), BalanceSettings())
        descend(model)

    return step


def their_step(peer: Any, windows: torch.Tensor) -> Callable[[], None]:
    peer.config._experts_implementation = "grouped_mm"

    def step() -> None:
        logits = peer(windows[:, :-1], use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten()).backward()
        descend(peer)

    return step


def contenders(arguments: argparse.Namespace) -> dict[str, Callable[[], None]]:
    config = cut(preset(arguments.preset), arguments.layers)
    model = build(config, getattr(torch, arguments.dtype), "cpu").train()
    windows = torch.randint(3, config.vocab_size, (1, arguments.tokens + 1))
    steps = {"yuanmoe": our_step(model, windows)}
    if arguments.only != "yuanmoe":
        peer = build_mixtral(model).train().requires_grad_()
        steps["mixtral grouped_mm"] = their_step(peer, windows)
    return {arguments.only: steps[arguments.only]} if arguments.only else steps


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of both, and the ratio; peak memory of each by itself."""
    steps = contenders(arguments)
    timings = take_turns(steps, arguments.runs, lambda name, s: print(f"{name}: {s:.2f} s", file=sys.stderr))
    config = cut(preset(arguments.preset), arguments.layers)
    flops = arguments.tokens * cost.training_flops(config, (arguments.tokens + 1) / 2)
    found: dict[str, Any] = {
        name: timing.to_dict() | {"tokens_per_s": timing.rate(arguments.tokens), "flops_per_s": timing.rate(flops)}
        for name, timing in timings.items()
    }
    del steps
    for name in timings:
        found[name]["peak_mib"] = peak_mib(name)
    found["ratio"] = timings["mixtral grouped_mm"].median_s / timings["yuanmoe"].median_s
    return found | {"layers": arguments.layers, "tokens": arguments.tokens, "dtype": arguments.dtype}


def peak_mib(name: str) -> float:
    """Largest resident memory of a process that takes one step of one contender."""
    command = [sys.executable, *sys.argv, "--only", name]
    seen = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(seen.stdout.splitlines()[-1])["peak_mib"]


def take_one(arguments: argparse.Namespace) -> dict[str, Any]:
    contenders(arguments)[arguments.only]()
    # Not getrusage: a new program inherits the peak of the process that started it.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak, "Linux tells it"
    return {"peak_mib": int(peak[1]) * 1024 / MIB}


def measure_small(arguments: argparse.Namespace) -> dict[str, Any]:
    """Whole steps of the recipe `small`, AdamW included: the share of the matmul peak, and where the time goes."""
    from yuanmoe.cli.doctor.probe import matmul_rate

    recipe = small().replace("run", dtype=arguments.dtype)
    model = new_model(recipe).train()
    optimizer = Optimizer(model, recipe.optimizer)
    shape = (recipe.data.batch_size, recipe.data.sequence_length + 1)
    windows = torch.randint(3, recipe.model.vocab_size, shape)

    def step() -> None:
        learn(model, Windows(windows), recipe.data.windows_at_once, recipe.balance)
        optimizer.clip(1.0).item()
        optimizer.step(1.0)
        optimizer.zero_grad()

    step()
    seconds, peaks = [], []
    for _ in range(arguments.runs):
        peaks.append(matmul_rate(torch.device("cpu"), torch.bfloat16, size=1024).median)
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
        print(f"{seconds[-1]:.2f} s, matmul {peaks[-1] / 1e9:.1f} GFLOP/s", file=sys.stderr)
    with torch.profiler.profile() as profile:
        step()
    table = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=18, max_name_column_width=44)
    print(table, file=sys.stderr)
    flops = flops_per_token(recipe) * recipe.data.tokens_per_step
    shares = sorted(flops / s / peak for s, peak in zip(seconds, peaks, strict=True))
    return {
        "dtype": arguments.dtype,
        "tokens_per_s": recipe.data.tokens_per_step / sorted(seconds)[len(seconds) // 2],
        "share_of_bf16_matmul_peak": {"median": shares[len(shares) // 2], "min": shares[0], "max": shares[-1]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="yuan2-m32", help="whose layer sizes")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default=None)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="whole steps of the recipe `small`")
    parser.add_argument("--only", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.dtype = arguments.dtype or ("float32" if arguments.small else "bfloat16")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    found = take_one(arguments) if arguments.only else (measure_small if arguments.small else compare)(arguments)
    print(json.dumps(found | {"threads": arguments.threads, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
