"""`yuanmoe bench`: how fast this machine runs the model, beside its peers and its bounds."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from yuanmoe.cli.output import people, print_result, print_table


def bench(
    preset: Annotated[str, typer.Option(help="Whose layer sizes.")] = "yuan2-m32",
    layers: Annotated[int, typer.Option(min=1, help="How many of its layers.")] = 2,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the prefill.")] = 256,
    runs: Annotated[int, typer.Option(min=1, help="Counted runs of each contender.")] = 5,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 takes all cores.")] = 0,
    peer: Annotated[bool, typer.Option(help="Run transformers' Mixtral of the same sizes beside.")] = True,
) -> None:
    """Prefill and single-token decode of a few layers at full width, side by side with transformers' Mixtral.

    Contenders take turns in one run; every figure is a median with the slowest and fastest run. Needs memory for
    the layers: 6.5 GiB for two of M32's in bfloat16.
    """
    import os

    import torch

    from yuanmoe.config import preset as named
    from yuanmoe.plan.machine import measure_bandwidth
    from yuanmoe.studies.layers import compare_layers

    torch.set_num_threads(threads or os.cpu_count() or 1)
    console = people()
    with console.status("building layers") as status:
        result = compare_layers(
            named(preset),
            num_hidden_layers=layers,
            prompt_tokens=prompt_tokens,
            runs=runs,
            dtype=getattr(torch, dtype),
            device=device,
            peer=peer,
            on_run=lambda name, seconds: status.update(f"{name}: {seconds * 1e3:.1f} ms"),
        )
    if device == "cpu":
        bandwidth = measure_bandwidth()
        result["read_bytes_per_s"] = asdict(bandwidth)
        bytes_per_s = result["decode_bytes"] / result["decode"]["yuanmoe"]["median_s"]
        result["decode"]["share_of_read_bandwidth"] = bytes_per_s / bandwidth.median
    result |= {"preset": preset, "device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    for phase in ("prefill", "decode"):
        _print_phase(console, phase, result)
    print_result(result)


def _print_phase(console: Any, phase: str, result: dict[str, Any]) -> None:
    report = result[phase]
    rows = [
        (
            name,
            f"{timing['median_s'] * 1e3:.1f}",
            f"{timing['min_s'] * 1e3:.1f} to {timing['max_s'] * 1e3:.1f}",
            f"{timing['tokens_per_s']['median']:.1f}",
        )
        for name, timing in report.items()
        if isinstance(timing, dict)
    ]
    print_table(console, phase, ("", "ms", "spread", "tokens/s"), rows)
    if "share_of_read_bandwidth" in report:
        console.print(f"{report['share_of_read_bandwidth']:.0%} of the read bandwidth measured in this run")
    if "best_peer" in report:
        console.print(f"{report['speed_against_best_peer']:.2f} x the speed of {report['best_peer']}")
