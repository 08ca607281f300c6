"""`yuanmoe plan`: what a model costs, where it fits and how fast it can be there, before loading anything.

Running it on one device is told by `plan_device.py`, training it on a cluster by `plan_cluster.py`.
"""

from typing import Annotated, Literal

import typer

from yuanmoe.cli.plan.cluster import Wishes, cluster_report, request_of, show_cluster
from yuanmoe.cli.plan.device import device_report, show_device
from yuanmoe.cli.terminal.output import Json, people, print_result
from yuanmoe.errors import UsageError
from yuanmoe.estimate import device_named, read_model
from yuanmoe.plan.cluster.cluster import parse_cluster
from yuanmoe.plan.device.planner import workload_of
from yuanmoe.presets import PRESETS
from yuanmoe.units import parse_size

RUNNING = ("bits", "context", "batch", "kv_dtype", "device")
TRAINING = ("nodes", "tokens", "seq", "global_batch", "stages", "layout", "link", "network", "efficiency")
"""Options that belong to one of both questions."""


def plan(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help=f"A directory with a config.json, or one of {', '.join(PRESETS)}.")],
    bits: Annotated[
        int | None, typer.Option(help="16, 8 or 4; by default the most that fits, or those of a quantized checkpoint.")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of a sequence; by default the model's longest.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences side by side.")] = 1,
    ram: Annotated[str | None, typer.Option(help="Memory of a device to plan for, such as 24GiB.")] = None,
    kv_dtype: Annotated[Literal["bf16", "int8"], typer.Option(help="Of keys and values.")] = "bf16",
    device: Annotated[
        str | None, typer.Option(help="A named device, such as rtx-4090; by default this machine's CPU.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Plan training instead, on nodes such as 8xh100-80; cpu is this machine.")
    ] = None,
    nodes: Annotated[int, typer.Option(help="Training: nodes of the cluster.")] = 1,
    tokens: Annotated[float | None, typer.Option(help="Training: tokens altogether, such as 2e12.")] = None,
    seq: Annotated[int | None, typer.Option(help="Training: tokens of a sequence; default: as context.")] = None,
    global_batch: Annotated[
        int | None, typer.Option(help="Training: sequences of a step; default: about four million tokens.")
    ] = None,
    stages: Annotated[str | None, typer.Option(help="Training: layers of each pipeline stage, such as 2,3,3.")] = None,
    layout: Annotated[str, typer.Option(help="Training: words of a layout to keep to, such as 'pp8 full'.")] = "",
    link: Annotated[str | None, typer.Option(help="Training: rate within a node, one way, such as 450GB/s.")] = None,
    network: Annotated[
        str | None, typer.Option(help="Training: rate of a network card, one way, such as 400Gb/s.")
    ] = None,
    efficiency: Annotated[float, typer.Option(help="Training: share of its matmul peak that a device keeps up.")] = 0.5,
    json_only: Json = False,
) -> None:
    """Say whether a model fits, how fast it can be and what it costs, without loading it."""
    name, config, stored = read_model(model)
    memory_bytes = parse_size(ram) if ram else None
    if cluster is not None:
        _refuse(ctx, RUNNING, "is about running a model; leave it out with --cluster")
        wishes = Wishes(
            nodes=nodes,
            seq=seq,
            global_batch=global_batch,
            stages=stages,
            layout=layout,
            link=link,
            network=network,
            efficiency=efficiency,
        )
        devices, device_name = parse_cluster(cluster)
        target = device_named(None if device_name == "cpu" else device_name, memory_bytes)
        report, show = cluster_report(name, request_of(config, target, devices, wishes), tokens), show_cluster
    else:
        _refuse(ctx, TRAINING, "is about training; it needs --cluster")
        target = device_named(device, memory_bytes)
        context = config.max_position_embeddings if context is None else context
        kv_bits = 8 if kv_dtype == "int8" else 16
        load = workload_of(config, stored, target, context=context, batch=batch, kv_bits=kv_bits)
        report, show = device_report(name, load if bits is None else load.with_bits(bits), target), show_device
    if not json_only:
        show(report, people())
    print_result(report, json_only)


def _refuse(ctx: typer.Context, options: tuple[str, ...], reason: str) -> None:
    for option in options:
        source = ctx.get_parameter_source(option)
        if source is not None and source.name == "COMMANDLINE":
            raise UsageError(f"--{option.replace('_', '-')} {reason}")
