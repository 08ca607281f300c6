"""A few layers of Yuan 2.0-M32's sizes in 4 bits beside llama.cpp's Q4_0, in turns, in one run.

llama.cpp has no Yuan architecture: its side is a llama with as many experts of the same sizes, without Localized
Filtering, random weights in a GGUF of its own. It is compiled from source, about five minutes, into an environment of
its own, because it brings its own threads and numpy:

    python -m venv llama-env
    llama-env/bin/pip install gguf llama-cpp-python
    python benchmarks/llama_cpp.py --python llama-env/bin/python [--layers N] [--threads N] [--runs N] > result.json

Decoding: GB/s of weights that one token reads behind 16 others, each side by its own count. Prefill: tokens/s.
"""

import argparse
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the program sets it; read when torch loads

import torch

from yuanmoe.bench.decode import DECODE_RUNS
from yuanmoe.bench.layers import cut, our_steps
from yuanmoe.bench.products import Contender, reading
from yuanmoe.bench.synthetic import synthetic_model
from yuanmoe.bench.timing import Timing, take_turns
from yuanmoe.checkpoint.formats.packed_weight import policy
from yuanmoe.cli.terminal.output import people, print_result, print_table
from yuanmoe.ops import native
from yuanmoe.plan import cost
from yuanmoe.plan.device.machine import read_machine
from yuanmoe.presets import preset

CONTEXT = 16


class Peer:
    """The other side, in its own process."""

    def __init__(self, python: Path, sizes: dict[str, int]) -> None:
        # -P: this folder's llama_cpp is not the module of that name.
        command = [python, "-P", Path(__file__).with_name("llama_cpp_peer.py")]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, text=True, **pipes)
        ready = self._ask(json.dumps(sizes)).split()
        if ready[:1] != ["ready"]:
            raise SystemExit(f"{python} runs no llama.cpp; its environment needs: pip install gguf llama-cpp-python")
        self.bytes_per_token = int(ready[1])

    def step(self, kind: str, amount: int) -> Callable[[], object]:
        return lambda: self._ask(f"{kind} {amount}")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(line, file=self._process.stdin, flush=True)
        return self._process.stdout.readline()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", type=Path, required=True, help="Of the environment with llama-cpp-python.")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512, help="Of the prompt.")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = cut(preset("yuan2-m32"), options.layers)
    precision = policy(config, 4)
    model = synthetic_model(config, precision)
    prefill, _ = our_steps(model, torch.randint(3, 1000, (options.tokens,)))
    fill, decode = our_steps(model, torch.randint(3, 1000, (CONTEXT,)))
    fill()
    peer = Peer(
        options.python,
        {
            "layers": options.layers,
            "hidden": config.hidden_size,
            "attention": config.attention_size,
            "heads": config.num_attention_heads,
            "experts": config.experts_per_layer[0],
            "chosen": config.num_experts_per_tok,
            "width": config.moe_intermediate_size,
            "vocabulary": config.vocab_size,
            "context": max(options.tokens, CONTEXT + 1),
            "threads": options.threads,
        },
    )
    ours = cost.decode_bytes(config, precision, context=CONTEXT)
    contenders = {"yuanmoe": (decode, ours), "llama.cpp Q4_0": (peer.step("decode", CONTEXT), peer.bytes_per_token)}
    read = reading()
    decoding = _rates(contenders, DECODE_RUNS * options.runs, read)
    contenders = {
        "yuanmoe": (prefill, options.tokens),
        "llama.cpp Q4_0": (peer.step("prefill", options.tokens), options.tokens),
    }
    reading_prompt = _rates(contenders, options.runs)
    peer.close()
    machine = read_machine()
    _show("decoding, GB/s of weights", decoding, 1e9)
    _show(f"prefill of {options.tokens}, tokens/s", reading_prompt, 1)
    facts = {"cpu": machine.cpu, "load": machine.load, "threads": options.threads, "variant": native.variant()}
    print_result(facts | {"layers": options.layers, "decode_bytes_per_s": decoding, "prefill_per_s": reading_prompt})


def _rates(
    contenders: dict[str, tuple[Callable[[], object], float]], runs: int, read: Contender | None = None
) -> dict[str, dict[str, float]]:
    calls = {name: call for name, (call, _) in contenders.items()} | ({read.name: read.call} if read else {})
    amounts = {name: amount for name, (_, amount) in contenders.items()} | ({read.name: read.amount} if read else {})
    timings: dict[str, Timing] = take_turns(calls, runs)
    return {name: timing.rate(amounts[name]) for name, timing in timings.items()}


def _show(title: str, rates: dict[str, dict[str, float]], unit: float) -> None:
    rows = [[name, *(f"{rate[at] / unit:.1f}" for at in ("median", "min", "max"))] for name, rate in rates.items()]
    print_table(people(), title, ["", "median", "slowest", "fastest"], rows)


if __name__ == "__main__":
    main()
