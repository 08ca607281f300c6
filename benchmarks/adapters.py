"""What LoRA adapters cost a batch: layers of Yuan 2.0-M32's sizes in 4 bits, decode steps of the engine, in turns.

    python benchmarks/adapters.py [--layers N] [--adapters N] [--rank N] [--batch N] [--steps N] > result.json

Random weights and factors of the roles that `m32-lora` adapts, experts included; greedy answers behind prompts of 16
random tokens. The table (stderr) and the JSON (stdout) give milliseconds of a step where nobody has an adapter, where
all have the same, and where each has one of several.
"""

import argparse
import os
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the program sets it; read when torch loads

import torch
from torch import Tensor

from yuanmoe.bench.layers import cut
from yuanmoe.bench.synthetic import synthetic_model
from yuanmoe.bench.timing import take_turns
from yuanmoe.checkpoint.adapters.adapter import adaptable_matrices
from yuanmoe.checkpoint.formats.packed_weight import policy
from yuanmoe.cli.terminal.output import people, print_result, print_table
from yuanmoe.engine.engine import Engine
from yuanmoe.engine.requests import Request
from yuanmoe.engine.sampling import SamplingParams
from yuanmoe.model.lora.attach import new_factors
from yuanmoe.model.lora.multi_lora import MultiLora
from yuanmoe.model.lora.targets import LoraSettings, targets
from yuanmoe.ops import native
from yuanmoe.plan.device.machine import read_machine
from yuanmoe.presets import preset

PROMPT_TOKENS = 16
CACHE_TOKENS = 16384


class Factors(NamedTuple):
    """An adapter that was never trained."""

    settings: LoraSettings
    tensors: dict[str, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = cut(preset("yuan2-m32"), options.layers)
    model = synthetic_model(config, policy(config, 4))
    settings = LoraSettings(rank=options.rank)
    shapes = targets(adaptable_matrices(config), settings)
    names = [str(number) for number in range(options.adapters)]
    adapters = MultiLora(model, {name: Factors(settings, new_factors(shapes, settings, int(name))) for name in names})
    worn = {"no adapter": [None], "one adapter": names[:1], f"{options.adapters} adapters": names}
    engines = {}
    for title, each in worn.items():
        engine = Engine(model, adapters=adapters, cache_tokens=CACHE_TOKENS, max_batch_size=options.batch)
        for place in range(options.batch):
            prompt = torch.randint(3, config.vocab_size, (PROMPT_TOKENS,)).tolist()
            params = SamplingParams(max_new_tokens=options.steps + 16)
            engine.submit(Request(prompt_ids=prompt, params=params, adapter=each[place % len(each)]))
        while engine.stats().generated_tokens < 2 * options.batch:
            engine.step()
        engines[title] = engine.step
    timings = take_turns(engines, options.steps)
    first = timings["no adapter"].median_s
    rows = [
        [title, *(f"{1e3 * s:.1f}" for s in (t.median_s, t.min_s, t.max_s)), f"{t.median_s / first:.2f} x"]
        for title, t in timings.items()
    ]
    title = f"a step of {options.batch} sequences, {options.layers} layers, rank {options.rank}, ms"
    print_table(people(), title, ["", "median", "fastest", "slowest", ""], rows)
    machine = read_machine()
    facts = {"cpu": machine.cpu, "load": machine.load, "threads": options.threads, "variant": native.variant()}
    print_result(facts | vars(options) | {"steps_s": {name: timing.to_dict() for name, timing in timings.items()}})


if __name__ == "__main__":
    main()
