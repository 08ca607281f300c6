"""What `yuanmoe quantize` tells people: what it is about to write, what was lost, and what that does to a text."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from yuanmoe.cli.terminal.output import print_table
from yuanmoe.plan.cost import ROLES
from yuanmoe.plan.device.machine import read_machine
from yuanmoe.plan.device.planner import Workload, memory
from yuanmoe.units import format_size

if TYPE_CHECKING:
    from yuanmoe.checkpoint.quantize.quantize import QuantizeJob

CONTEXT = 2048
"""Tokens of the context for which it is said whether the result fits into memory."""


def show_plan(console: Console, job: "QuantizeJob", dst: Path, eval_ids: Sequence[int]) -> None:
    """Bytes by role, and whether disk and memory suffice."""
    from yuanmoe.checkpoint.quantize.report import sizes, total_sizes

    source, by_role = job.source, sizes(job.source, job.formats)
    whole = total_sizes(by_role)
    title = f"{escape(source.path.name)} ({source.format}) by {job.method}, groups of {job.precision.group_size}"
    rows = [
        [name.replace("_", " "), _bits(size), f"{size['parameters']:,}", *_sizes(size)]
        for name, size in by_role.items()
    ]
    rows.append(["total", "", f"{whole['parameters']:,}", *_sizes(whole)])
    print_table(console, title, ["", "bits", "weights", "now", "then"], rows)
    for line in (_disk_line(dst, whole["bytes"]), _memory_line(job, whole["bytes"])):
        console.print(line, soft_wrap=True, markup=False)
    if eval_ids:
        console.print(_eval_line(len(eval_ids), whole["source_bytes"]), soft_wrap=True, markup=False)
    console.print()


def _bits(size: Mapping[str, Any]) -> str:
    return "as it is" if size["bits"] == 16 else str(size["bits"])


def _sizes(size: Mapping[str, Any]) -> tuple[str, str]:
    return format_size(size["source_bytes"]), format_size(size["bytes"])


def _disk_line(dst: Path, nbytes: int) -> str:
    partial = dst.with_name(dst.name + ".partial")
    there = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file()) if partial.is_dir() else 0
    folder = next(parent for parent in dst.absolute().parents if parent.exists())
    begun = f", {format_size(there)} of it are there" if there else ""
    return f"disk: {format_size(nbytes)} to write{begun}; {format_size(shutil.disk_usage(folder).free)} are free"


def _memory_line(job: "QuantizeJob", nbytes: int) -> str:
    """Memory that running the result takes, beside what this machine has."""
    config = job.source.config
    context = min(CONTEXT, config.max_position_embeddings)
    load = Workload(config=config, bits=min(form.bits for form in job.formats.values()), context=context)
    needed = replace(memory(load), weights=nbytes).total
    line = f"memory to run it: {format_size(needed)} with {context:,} tokens of context"
    here = read_machine().memory_bytes
    if here is None:
        return line
    verdict = "fits" if needed <= here else "part of the weights would be read from the disk for every token"
    return f"{line}; this machine has {format_size(here)}: {verdict}"


def _eval_line(tokens: int, source_bytes: int) -> str:
    line = f"afterwards both models read {tokens:,} tokens, the original in float32, a layer in memory at a time"
    free = read_machine().available_bytes
    if free is not None and source_bytes > free:
        line += (
            f": {format_size(source_bytes)} come from the disk once more, as they do not fit {format_size(free)} of "
            "free memory"
        )
    return line


def show_report(console: Console, report: Mapping[str, Any]) -> None:
    """What was lost, by role, layer and matrix."""
    rows = [
        [role.replace("_", " "), _bits(size), *_sizes(size), _decibels(size["snr_db"])]
        for role, size in report["roles"].items()
        if "snr_db" in size
    ]
    total = report["total"]
    rows.append(["all weights", "", *_sizes(total), ""])
    print_table(console, "What was lost", ["", "bits", "now", "then", "signal to noise, dB"], rows)
    if report["layers"]:
        roles = [role for role in ROLES if role in report["layers"][0] or role in report["layers"][-1]]
        rows = [
            [str(layer["layer"]), *(_decibels(layer[role]) if role in layer else "" for role in roles)]
            for layer in report["layers"]
        ]
        columns = ["layer", *(role.replace("_", " ") for role in roles)]
        print_table(console, "By layer, dB (6 dB are one bit)", columns, rows, left=())
    if report["worst"]:
        rows = [[worst["name"], worst["part"], _decibels(worst["snr_db"])] for worst in report["worst"]]
        print_table(console, "The worst", ["", "", "dB"], rows, left=(0, 1))
    for note in report["notes"]:
        console.print(f"[bold]note[/]: {escape(note)}", soft_wrap=True)


def _decibels(ratio: float | None) -> str:
    return "exact" if ratio is None else f"{ratio:.1f}"


def show_quality(console: Console, quality: Mapping[str, Any]) -> None:
    """Both models on a text."""
    error = quality["standard_error"]
    spread = "" if error is None else f" +- {error:.2%}"
    changed, decisions = quality["routing_changed"], quality["routing_decisions"]
    rows = [
        ["perplexity", f"{quality['perplexity_before']:,.3f}", f"{quality['perplexity_after']:,.3f}"],
        ["", "", f"{quality['perplexity_change']:+.2%}{spread}"],
        ["the same likeliest token", "", f"{quality['top1_agreement']:.2%}"],
    ]
    if decisions:
        rows.append(["routing decisions changed", "", f"{changed:,} of {decisions:,} ({changed / decisions:.2%})"])
    title = f"On {escape(quality['text'])}: {quality['scored_tokens']:,} tokens, in windows of {quality['context']:,}"
    print_table(console, title, ["", "original", "quantized"], rows)
