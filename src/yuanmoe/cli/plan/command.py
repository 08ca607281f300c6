"""`yuanmoe plan`: what a model costs, where it fits and how fast it can be there, before loading anything.

Running it on one device is told by `plan_device.py`, training it on a cluster by `plan_cluster.py`.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from yuanmoe.cli.plan.cluster import Wishes, cluster_report, request_of, show_cluster
from yuanmoe.cli.plan.device import device_report, show_device
from yuanmoe.cli.terminal.output import people, print_result
from yuanmoe.config import ModelConfig
from yuanmoe.errors import UsageError
from yuanmoe.plan import cost
from yuanmoe.plan.cluster.cluster import parse_cluster
from yuanmoe.plan.device.devices import Device, find_device
from yuanmoe.plan.device.machine import as_device, measure_bandwidth, measure_matmul, read_machine
from yuanmoe.plan.device.planner import workload_of
from yuanmoe.presets import ALIASES, PRESETS, preset
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
    json_only: Annotated[bool, typer.Option("--json", help="Print the JSON line and no tables.")] = False,
) -> None:
    """Say whether a model fits, how fast it can be and what it costs, without loading it."""
    name, config, stored = read_model(model)
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
        target = _device(None if device_name == "cpu" else device_name, ram)
        report, show = cluster_report(name, request_of(config, target, devices, wishes), tokens), show_cluster
    else:
        _refuse(ctx, TRAINING, "is about training; it needs --cluster")
        target = _device(device, ram)
        context = config.max_position_embeddings if context is None else context
        kv_bits = 8 if kv_dtype == "int8" else 16
        load = workload_of(config, stored, target, context=context, batch=batch, kv_bits=kv_bits)
        report, show = device_report(name, load if bits is None else load.with_bits(bits), target), show_device
    if not json_only:
        show(report, people())
    print_result(report)


def _refuse(ctx: typer.Context, options: tuple[str, ...], reason: str) -> None:
    for option in options:
        source = ctx.get_parameter_source(option)
        if source is not None and source.name == "COMMANDLINE":
            raise UsageError(f"--{option.replace('_', '-')} {reason}")


def read_model(model: str) -> tuple[str, ModelConfig, cost.Precision | None]:
    """A name and a configuration: of a preset, or of a checkpoint directory of any format, and how it is quantized.

    Raises UsageError when it is neither, and what opening a checkpoint raises.
    """
    directory = Path(model)
    if directory.is_dir():
        # Checkpoints know torch's dtypes, and importing torch takes seconds; a preset needs none of it.
        from yuanmoe.checkpoint.open import read_config

        return directory.resolve().name, *read_config(directory)
    name = ALIASES.get(model.lower(), model.lower())
    if name not in PRESETS:
        raise UsageError(f"{model!r} is neither a directory nor a preset; presets: {', '.join(PRESETS)}")
    return name, preset(name), None


def _device(name: str | None, ram: str | None) -> Device:
    memory_bytes = parse_size(ram) if ram else None
    if name is None:
        return as_device(read_machine(), measure_bandwidth(), measure_matmul(), memory_bytes)
    device = find_device(name)
    return device.with_memory(memory_bytes) if memory_bytes else device
