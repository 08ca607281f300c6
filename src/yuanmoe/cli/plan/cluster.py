"""What `yuanmoe plan --cluster` says of training on several devices: one JSON object, and tables of the same object.

The numbers are `yuanmoe.plan`'s.
"""

import dataclasses
import math
from typing import Any

from rich.console import Console

from yuanmoe.cli.terminal.output import print_table
from yuanmoe.config import ModelConfig
from yuanmoe.errors import UsageError
from yuanmoe.plan import cost
from yuanmoe.plan.cluster.cluster import Cluster, wires_of
from yuanmoe.plan.cluster.layout import TrainingStep, read_stages
from yuanmoe.plan.cluster.relief import cluster_remedies
from yuanmoe.plan.cluster.search import (
    ClusterRequest,
    Plan,
    equation_4_s,
    model_flops,
    model_flops_utilization,
    nearest,
    rank,
)
from yuanmoe.plan.device.devices import Device
from yuanmoe.units import GIB, format_count, format_size, parse_rate

RUNNERS_UP = 5
"""Layouts shown after the fastest."""

SHORT: dict[str, str] = {"optimizer": "optim.", "activations": "activ.", "gradients": "grads"}
"""Headings that let the widest table fit 80 columns."""

TOKENS_PER_STEP = 2**22
"""Of the default global batch: four million, as large models take."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """Options of `plan --cluster`, as typed."""

    nodes: int
    seq: int | None
    global_batch: int | None
    stages: str | None
    layout: str
    link: str | None
    network: str | None
    efficiency: float


def request_of(config: ModelConfig, device: Device, devices_per_node: int, wishes: Wishes) -> ClusterRequest:
    """What is asked of the planner. Raises UsageError for numbers that make no sense."""
    wires = wires_of(device)
    if wishes.link:
        wires = dataclasses.replace(wires, link=parse_rate(wishes.link), link_source="--link")
    if wishes.network:
        wires = dataclasses.replace(wires, card=parse_rate(wishes.network), card_source="--network")
    cluster = Cluster(
        device=device,
        devices_per_node=devices_per_node,
        nodes=wishes.nodes,
        wires=wires,
        matmul_share=wishes.efficiency,
    )
    length = config.max_position_embeddings if wishes.seq is None else wishes.seq
    default_batch = cluster.size * math.ceil(TOKENS_PER_STEP / max(1, length) / cluster.size)
    batch = default_batch if wishes.global_batch is None else wishes.global_batch
    return ClusterRequest(
        training=TrainingStep(config=config, sequence_length=length, global_batch=batch),
        cluster=cluster,
        words=tuple(wishes.layout.lower().split()),
        stages=None if wishes.stages is None else read_stages(wishes.stages),
    )


def cluster_report(name: str, request: ClusterRequest, tokens: float | None) -> dict[str, Any]:
    """Everything `yuanmoe plan --cluster` says, as JSON values; `tokens` is the budget of the whole training."""
    if tokens is not None and not 0 < tokens < math.inf:
        raise UsageError(f"tokens is {tokens}; it must be a number above 0")
    plans = rank(request)
    best = plans[0] if plans else nearest(request)
    training, cluster = request.training, request.cluster
    return {
        "command": "plan",
        "model": name,
        "cluster": dataclasses.asdict(cluster) | {"devices": cluster.size},
        "training": {
            "sequence_length": training.sequence_length,
            "global_batch": training.global_batch,
            "tokens_per_step": training.tokens,
            "model_flops_per_step": model_flops(training),
        },
        "fits": bool(plans),
        "plan": _plan(request, best),
        "runners_up": [_plan(request, plan) for plan in plans[1 : RUNNERS_UP + 1]],
        "remedies": [] if plans else cluster_remedies(request, best),
        "equation_4_s": equation_4_s(request, best.layout),
        "longest_context": training.config.max_position_embeddings,
        "budget": None if tokens is None else _budget(request, best, tokens),
    }


def _plan(request: ClusterRequest, plan: Plan) -> dict[str, Any]:
    step_s = plan.time.total
    return {
        "layout": " ".join(plan.layout.words),
        **dataclasses.asdict(plan.layout),
        "accumulation": plan.layout.accumulation(request.training),
        "layers": list(plan.stages),
        "memory": [dataclasses.asdict(stage) | {"total": stage.total} for stage in plan.memory],
        "peak_bytes": plan.peak_bytes,
        "time_s": dataclasses.asdict(plan.time) | {"total": step_s},
        "tokens_per_s": request.training.tokens / step_s,
        "mfu": model_flops_utilization(request, step_s),
    }


def _budget(request: ClusterRequest, plan: Plan, tokens: float) -> dict[str, float]:
    seconds = tokens / request.training.tokens * plan.time.total
    return {
        "tokens": tokens,
        "steps": tokens / request.training.tokens,
        "days": seconds / cost.SECONDS_PER_DAY,
        "device_days": seconds / cost.SECONDS_PER_DAY * request.cluster.size,
        "petaflops_days": cost.petaflops_days(tokens * cost.training_flops(request.training.config)),
    }


def show_cluster(report: dict[str, Any], console: Console) -> None:
    """The report for people."""
    cluster, training, wires = report["cluster"], report["training"], report["cluster"]["wires"]
    device, devices = cluster["device"], f"{cluster['devices_per_node']} x " if cluster["devices_per_node"] > 1 else ""
    console.print(
        f"[bold]{report['model']}[/] on [bold]{cluster['nodes']} x {devices}{device['name']}[/], "
        f"{training['global_batch']:,} x {training['sequence_length']:,} tokens a step"
    )
    console.print(
        f"device: {format_size(device['memory_bytes'])}, {format_count(device['bf16_flops'], 'FLOP/s')}, "
        f"of which it keeps up {cluster['matmul_share']:.0%} ({device['source']})"
    )
    console.print(f"within a node: {format_count(wires['link'], 'B/s')} each way ({wires['link_source']})")
    console.print(f"network card: {format_count(wires['card'], 'B/s')} each way ({wires['card_source']})\n")
    for show in (_show_layouts, _show_time, _show_stages, _show_verdict):
        show(report, console)


def _show_layouts(report: dict[str, Any], console: Console) -> None:
    title = "Layouts that fit, fastest first" if report["fits"] else "No layout fits; this one misses by least"
    rows = [
        [
            plan["layout"],
            _seconds(plan["time_s"]["total"]),
            format_count(plan["tokens_per_s"]),
            f"{plan['mfu']:.1%}",
            format_size(plan["peak_bytes"]),
        ]
        for plan in (report["plan"], *report["runners_up"])
    ]
    print_table(console, title, ["", "step", "tokens/s", "MFU", "memory"], rows)


def _show_time(report: dict[str, Any], console: Console) -> None:
    time_s = report["plan"]["time_s"]
    rows = [
        [part, _seconds(seconds), f"{seconds / time_s['total']:.1%}" if seconds else "-"]
        for part, seconds in time_s.items()
    ]
    print_table(console, f"A step of {report['plan']['layout']}", ["", "takes", "share"], rows)


def _show_stages(report: dict[str, Any], console: Console) -> None:
    plan = report["plan"]
    parts: list[str] = list(plan["memory"][0])
    rows = [
        [str(stage), str(layers), *(f"{memory[part] / GIB:.1f}" for part in parts)]
        for stage, (layers, memory) in enumerate(zip(plan["layers"], plan["memory"], strict=True))
    ]
    headings = ["stage", "layers", *(SHORT.get(part, part) for part in parts)]
    print_table(console, "Memory of a device in each stage, GiB", headings, rows)


def _show_verdict(report: dict[str, Any], console: Console) -> None:
    longest, length = report["longest_context"], report["training"]["sequence_length"]
    if length > longest:
        console.print(f"[bold yellow]Note[/]: {length:,} tokens are more than the {longest:,} the model is made for.")
    budget = report["budget"]
    if budget is not None:
        console.print(
            f"{format_count(budget['tokens'])} tokens: {budget['steps']:,.0f} steps, {budget['days']:,.1f} days, "
            f"{budget['device_days']:,.0f} device-days; {budget['petaflops_days']:.3g} PetaFLOP/s-days of model FLOPs"
        )
    spare = report["cluster"]["device"]["memory_bytes"] - report["plan"]["peak_bytes"]
    if report["fits"]:
        console.print(f"[bold green]Fits[/]: {format_size(spare)} to spare in the fullest stage.")
        return
    console.print(f"[bold red]Does not fit[/]: {format_size(-spare)} too much in the fullest stage. What would:")
    for options in report["remedies"]:
        console.print(f"  {options}")


def _seconds(seconds: float) -> str:
    if seconds == 0:
        return "-"
    if seconds >= 100:
        return f"{seconds:,.1f} s"
    value, unit = (seconds, "s") if seconds >= 1 else (1e3 * seconds, "ms")
    return f"{value:#.3g}".rstrip(".") + f" {unit}"
