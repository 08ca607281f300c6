"""What the engine itself costs in a step: everything that is neither the model nor sampling.

    python benchmarks/engine.py [--preset nano] [--dtype float32] [--batches 1,4,16,64] [--steps N] > result.json

Random weights, greedy answers, prompts of 32 tokens; decode steps only. The table (stderr) and the JSON (stdout) give
the median of the steps, in microseconds.
"""

import argparse
import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

# Threads that spin while they wait slow each other where other programs run; read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

import yuanmoe.engine.engine as engine_module
from yuanmoe.checkpoint.formats.native_config import parse_dtype
from yuanmoe.cli.terminal.output import people, print_result, print_table
from yuanmoe.engine.engine import Engine
from yuanmoe.engine.requests import Request
from yuanmoe.engine.sampling import SamplingParams
from yuanmoe.model.decoder import CausalLM
from yuanmoe.presets import preset

PROMPT_TOKENS = 32


class Stopwatch:
    """The time spent in some functions since it was last read."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            start = time.perf_counter()
            result = function(*args)
            self._seconds += time.perf_counter() - start
            return result

        return wrapped

    def read(self) -> float:
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def measure(model: CausalLM, batch: int, steps: int, model_watch: Stopwatch, sample_watch: Stopwatch) -> dict:
    """Medians over `steps` decode steps of `batch` sequences."""
    engine = Engine(model, cache_tokens=batch * model.config.max_position_embeddings, max_batch_size=batch)
    for _ in range(batch):
        prompt = torch.randint(3, model.config.vocab_size, (PROMPT_TOKENS,)).tolist()
        engine.submit(Request(prompt_ids=prompt, params=SamplingParams(max_new_tokens=steps + 8)))
    while engine.stats().generated_tokens < 2 * batch:
        engine.step()
    watches = (model_watch, sample_watch)
    rows = []
    for _ in range(steps):
        for watch in watches:
            watch.read()
        start = time.perf_counter()
        engine.step()
        rows.append((time.perf_counter() - start, *(watch.read() for watch in watches)))
    step, in_model, in_sampling = (median(column) for column in zip(*rows, strict=True))
    own = median(row[0] - row[1] - row[2] for row in rows)
    named = {"step": step, "model": in_model, "sampling": in_sampling, "engine": own}
    times = {f"{name}_us": round(seconds * 1e6, 1) for name, seconds in named.items()}
    return {"batch": batch, **times, "engine_share": round(own / step, 4), "tokens_per_s": round(batch / step, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batches", default="1,4,16,64")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    config = preset(args.preset)
    model = CausalLM(config).initialize().to(parse_dtype(args.dtype)).eval()
    model_watch, sample_watch = Stopwatch(), Stopwatch()
    model.model.forward = model_watch.timed(model.model.forward)
    model.logits = model_watch.timed(model.logits)
    engine_module.sample = sample_watch.timed(engine_module.sample)
    steps = min(args.steps, config.max_position_embeddings - PROMPT_TOKENS - 8)
    batches = map(int, args.batches.split(","))
    results = [measure(model, batch, steps, model_watch, sample_watch) for batch in batches]
    title = f"One decode step of {args.preset} in {args.dtype}, {args.threads} threads: microseconds"
    print_table(people(), title, list(results[0]), [[str(value) for value in row.values()] for row in results])
    print_result(
        {"preset": args.preset, "dtype": args.dtype, "threads": args.threads, "steps": steps, "batches": results}
    )


if __name__ == "__main__":
    main()
