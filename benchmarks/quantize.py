"""How fast checkpoints of Yuan 2.0-M32's sizes are quantized, and in how much memory.

    python benchmarks/quantize.py [--methods rtn mse gptq] [--layers N] [--experts N] [--threads N] > result.json

Weights of full width come from a generator (normal numbers, no 80 GB file) and pass through
`checkpoint/quantize/quantize.py` into files on the disk of `--folder`, as they would from a checkpoint. A few layers
and experts stand for all: the time of the whole model is extrapolated by its bytes. The table (stderr) and the JSON
(stdout) give MB/s of bfloat16 input, by the clock and by the time that cores spent, which other programs disturb less.
"""

import argparse
import dataclasses
import os
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from torch import Tensor

from yuanmoe.checkpoint.files.lazy import LazyTensor
from yuanmoe.checkpoint.formats.mapping import layout
from yuanmoe.checkpoint.formats.native_config import Origin
from yuanmoe.checkpoint.formats.packed_weight import packed_formats, policy
from yuanmoe.checkpoint.open import OpenCheckpoint
from yuanmoe.checkpoint.quantize.quantize import Method, QuantizeJob, run
from yuanmoe.cli.terminal.output import people, print_result, print_table
from yuanmoe.cli.terminal.progress import bytes_progress
from yuanmoe.config import ModelConfig
from yuanmoe.plan import cost
from yuanmoe.plan.device.machine import read_machine
from yuanmoe.presets import preset
from yuanmoe.units import format_size

NUMBERS = 1 << 25
"""Different normal numbers; 64 MiB, more than caches hold."""
SPREAD = 0.02
TEXT_TOKENS = 4096
"""For gptq."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated(LazyTensor):
    """Normal numbers over and over, starting elsewhere in every tensor."""

    numbers: Tensor
    offset: int

    def flat(self, start: int, stop: int) -> Tensor:
        places = torch.arange((start + self.offset) // NUMBERS, (stop + self.offset - 1) // NUMBERS + 1)
        parts = []
        for lap in places.tolist():
            first = max(start + self.offset - lap * NUMBERS, 0)
            parts.append(self.numbers[first : min(stop + self.offset - lap * NUMBERS, NUMBERS)])
        return torch.cat(parts)


def synthetic(config: ModelConfig) -> OpenCheckpoint:
    """A checkpoint that is nowhere; norms are 1."""
    numbers = (torch.randn(NUMBERS) * SPREAD).bfloat16()
    ones = torch.ones(NUMBERS, dtype=torch.bfloat16)
    tensors: dict[str, LazyTensor] = {}
    for index, (name, shape) in enumerate(layout(config).native.items()):
        source = ones if name.endswith("norm.weight") else numbers
        tensors[name] = Generated(shape=shape, dtype=torch.bfloat16, numbers=source, offset=index * 1_000_003 % NUMBERS)
    path = Path("synthetic")
    return OpenCheckpoint(
        path=path, format="native", config=config, tensors=tensors, stored=tensors, origin=Origin(), files=()
    )


def peak_bytes() -> int:
    """Resident memory at its highest since the last call; 0 where the system does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text())
    Path("/proc/self/clear_refs").write_text("5")
    return int(found[1]) * 1024 if found else 0


def measure(method: Method, source: OpenCheckpoint, folder: Path) -> dict[str, Any]:
    precision = policy(source.config, 4)
    text = torch.randint(3, source.config.vocab_size, (TEXT_TOKENS,)).tolist() if method == "gptq" else []
    job = QuantizeJob(
        source=source,
        precision=precision,
        method=method,
        calibration=text,
        formats=packed_formats(source.config, precision),
    )
    peak_bytes()
    start, start_cpu = time.perf_counter(), time.process_time()
    with bytes_progress(method) as progress:
        done = run(job, folder / method, progress=progress)
    seconds = time.perf_counter() - start
    size, whole = done.report["total"]["source_bytes"], 2 * sum(cost.parameters(preset("yuan2-m32")).values())
    return {
        "seconds": seconds,
        "input_bytes": size,
        "mb_per_s": size / seconds / 1e6,
        "mb_per_cpu_s": size / (time.process_time() - start_cpu) / 1e6,
        "whole_model_s": seconds * whole / size,
        "peak_bytes": peak_bytes(),
        "experts_snr_db": done.report["roles"]["experts"]["snr_db"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=("rtn", "mse", "gptq"), default=["rtn", "mse"])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="on a disk with room; a temporary one by default")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    # The vocabulary, 1.4 % of the bytes, is left small: it is quantized like any other matrix.
    config = preset("yuan2-m32").replace(
        num_hidden_layers=options.layers,
        num_experts=options.experts,
        vocab_size=1024,
        **dict.fromkeys(("eod_token_id", "sep_token_id", "pad_token_id"), 0),
    )
    machine, source = read_machine(), synthetic(config)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        results = {method: measure(method, source, Path(folder)) for method in options.methods}
    title = f"{options.layers} layers of {options.experts} experts, {options.threads} threads, load {machine.load:.1f}"
    rows = [
        [
            method,
            f"{found['mb_per_s']:.0f}",
            f"{found['mb_per_cpu_s']:.0f}",
            f"{found['seconds']:.0f}",
            f"{found['whole_model_s'] / 60:.0f}",
            format_size(found["peak_bytes"]),
        ]
        for method, found in results.items()
    ]
    columns = ["", "MB/s of input", "MB/s of a core", "seconds", "M32 in minutes, extrapolated", "peak memory"]
    print_table(people(), title, columns, rows)
    facts = {"cpu": machine.cpu, "load": machine.load, "torch": torch.__version__}
    settings = {key: value for key, value in vars(options).items() if key != "folder"}
    print_result(facts | settings | {"config": dataclasses.asdict(config), "results": results})


if __name__ == "__main__":
    main()
