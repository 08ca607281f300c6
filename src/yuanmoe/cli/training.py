"""One training run from the command line: shown while it goes, written to its folder, ended by its budget or by Ctrl-C.

Importing this file imports torch.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from yuanmoe.cli.interrupt import Interrupt
from yuanmoe.cli.probe import matmul_rate
from yuanmoe.cli.training_view import TrainingView
from yuanmoe.data.loader import ShuffledWindows, Windows
from yuanmoe.model.decoder import YuanForCausalLM
from yuanmoe.runs import RunFolder
from yuanmoe.train.loop import train
from yuanmoe.train.meter import Meter, bits_per_byte, metrics
from yuanmoe.train.recipe import Recipe
from yuanmoe.train.step import evaluate

SAMPLE_WINDOWS = 256
"""Held-out windows, spread evenly, that are measured while training goes on; all of them at its end."""


def run_training(
    model: YuanForCausalLM,
    recipe: Recipe,
    batches: ShuffledWindows,
    heldout: Windows,
    bytes_per_token: float,
    *,
    run_folder: Path,
    console: Console,
) -> dict[str, Any]:
    """Trains `model` in place; what came of it, as JSON values. `bytes_per_token` is that of the `heldout` text."""
    weight = model.head_weight
    with console.status("measuring this machine's matrix products"):
        peak = matmul_rate(weight.device, weight.dtype, size=1024).high
    sample = heldout[:: len(heldout) // SAMPLE_WINDOWS + 1]
    meter, progress, reading = Meter(recipe), None, None
    view = TrainingView(console=console, peak_flops=peak)
    with RunFolder(run_folder, recipe.to_dict()) as run, view, Interrupt() as interrupt:
        interrupt.graceful = True
        for progress in train(model, recipe, batches.batch, sample):
            reading = meter.read(progress)
            loss = progress.heldout_loss
            bits = None if loss is None else bits_per_byte(loss, bytes_per_token)
            run.log(metrics(progress, reading) | ({} if bits is None else {"heldout_bits_per_byte": bits}))
            view.show(progress, reading, bits)
            if interrupt.requested:
                break
    assert progress is not None, "a run has at least one step"
    assert reading is not None, "and every step is read"
    with console.status("measuring on the held-out text"):
        loss = evaluate(model, torch.from_numpy(heldout).to(weight.device))
    return {
        "steps": progress.step,
        "tokens": progress.tokens,
        "seconds": progress.elapsed_s,
        "interrupted": progress.share < 1,
        "heldout_bits_per_byte": bits_per_byte(loss, bytes_per_token),
        "tokens_per_s": meter.tokens_per_s,
        "flops_per_s": meter.tokens_per_s * meter.flops_per_token,
        "peak_flops_per_s": peak,
        "balance": [asdict(layer) for layer in reading.balance],
    }
