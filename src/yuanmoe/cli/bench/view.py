"""What `yuanmoe bench` shows people: tables of medians with their spread, and shares of the bounds beside them."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from yuanmoe.cli.terminal.output import print_table
from yuanmoe.units import format_size


def print_phase(console: Console, phase: str, result: dict[str, Any]) -> None:
    """Prefill or decoding of a few layers: a line for each contender."""
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


def print_decode(console: Console, result: dict[str, Any]) -> None:
    """Decoding and prefill of a whole model, and what stands beside them."""
    print_table(
        console,
        f"decoding, {result['layers']} layers, {result['bits']} bits, {result['threads']} threads",
        ("batch", "context", "tokens/s", "spread", "GB/s", "of bound", "experts"),
        [_decode_row(report) for report in result["decode"]],
        left=(),
    )
    console.print(f"read bandwidth {_spread(result['read_bytes_per_s'], 1e9)} GB/s")
    print_table(
        console,
        "prefill",
        ("tokens", "tokens/s", "spread", "first after", "GOP/s", "of bound"),
        [_prefill_row(report) for report in result["prefill"]],
        left=(),
    )
    if peak := result["int8_operations_per_s"]:
        console.print(f"8-bit multiply-adds in registers {_spread(peak, 1e9)} GOP/s")
    if resident := result["resident_bytes"]:
        console.print(f"resident memory {format_size(resident)}")
    for phase, report in result["beside_torch_int4"].items():
        if report:
            rates = " against ".join(f"{_spread(report[name])} {report[name]['unit']}" for name in ("yuanmoe", "torch"))
            console.print(f"{phase}: {rates} of torch's int4 product, {report['speed_against_torch']:.2f} x as fast")


def _decode_row(report: Mapping[str, Any]) -> list[str]:
    rate, at_work = report["tokens_per_s"], report["experts_read"]
    return [
        str(report["batch"]),
        str(report["context"]),
        f"{rate['median']:.1f}",
        f"{rate['min']:.1f} to {rate['max']:.1f}",
        f"{report['bytes_per_s']['median'] / 1e9:.1f}",
        f"{report['share_of_read_bandwidth']:.0%}",
        "" if at_work is None else f"{at_work:.1f}",
    ]


def _prefill_row(report: Mapping[str, Any]) -> list[str]:
    rate, share = report["tokens_per_s"], report["share_of_int8_peak"]
    return [
        str(report["tokens"]),
        f"{rate['median']:.1f}",
        f"{rate['min']:.1f} to {rate['max']:.1f}",
        f"{report['time_to_first_token_s']['median_s']:.2f} s",
        f"{report['operations_per_s']['median'] / 1e9:.1f}",
        "" if share is None else f"{share:.0%}",
    ]


def _spread(rate: Mapping[str, Any], unit: float = 1.0) -> str:
    return f"{rate['median'] / unit:.1f} ({rate['min'] / unit:.1f} to {rate['max'] / unit:.1f})"
