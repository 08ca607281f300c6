"""`yuanmoe plan`: what a model costs, whether it fits a device and how fast it can be there, before loading anything.

The numbers are `yuanmoe.plan`'s; here they become one JSON object, and tables of the same object.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from yuanmoe.cli.output import people, print_result, print_table
from yuanmoe.config import ALIASES, PRESETS, ModelConfig, preset
from yuanmoe.errors import UsageError
from yuanmoe.plan import cost
from yuanmoe.plan.devices import Device, find_device
from yuanmoe.plan.machine import as_device, measure_bandwidth, measure_matmul, read_machine
from yuanmoe.plan.planner import (
    EXPECTED_SHARE,
    LAYER_S,
    Load,
    Speed,
    decode,
    fits,
    load_of,
    memory,
    prefill,
    remedies,
)
from yuanmoe.plan.sizes import format_count, format_size, parse_size

BATCHES = (1, 4, 16)
"""Numbers of sequences side by side that are always shown."""


def plan(
    model: Annotated[str, typer.Argument(help=f"A directory with a config.json, or one of {', '.join(PRESETS)}.")],
    bits: Annotated[
        int | None, typer.Option(help="16, 8 or 4; by default the most that fits, or those of a quantized checkpoint.")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of a sequence; by default the model's longest.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences side by side.")] = 1,
    ram: Annotated[str | None, typer.Option(help="Memory to plan for, such as 24GiB.")] = None,
    kv_dtype: Annotated[Literal["bf16", "int8"], typer.Option(help="Of keys and values.")] = "bf16",
    device: Annotated[
        str | None, typer.Option(help="A named device, such as rtx-4090; by default this machine's CPU.")
    ] = None,
    json_only: Annotated[bool, typer.Option("--json", help="Print the JSON line and no tables.")] = False,
) -> None:
    """Say whether a model fits, how fast it can be and what it costs, without loading it."""
    name, config, stored = read_model(model)
    target = _device(device, ram)
    context = config.max_position_embeddings if context is None else context
    load = load_of(config, stored, target, context=context, batch=batch, kv_bits=8 if kv_dtype == "int8" else 16)
    report = report_of(name, load if bits is None else load.with_bits(bits), target)
    if not json_only:
        _show(report, people())
    print_result(report)


def read_model(model: str) -> tuple[str, ModelConfig, cost.Precision | None]:
    """A name and a configuration: of a preset, or of a checkpoint directory of any format, and how it is quantized.

    Where there is a config.json only that is read. Raises UsageError when it is neither, and what opening a checkpoint
    raises.
    """
    directory = Path(model)
    if directory.is_dir():
        return directory.resolve().name, *_read_config(directory)
    name = ALIASES.get(model.lower(), model.lower())
    if name not in PRESETS:
        raise UsageError(f"{model!r} is neither a directory nor a preset; presets: {', '.join(PRESETS)}")
    return name, preset(name), None


def _read_config(directory: Path) -> tuple[ModelConfig, cost.Precision | None]:
    # These know torch's dtypes, and importing torch takes seconds; a preset needs none of it.
    from yuanmoe.checkpoint.json_file import read_json
    from yuanmoe.checkpoint.native_config import FORMAT, read_native_config
    from yuanmoe.checkpoint.official_config import official_fields
    from yuanmoe.checkpoint.packed_weight import read_record
    from yuanmoe.checkpoint.store import open_checkpoint

    path = directory / "config.json"
    if not path.exists():
        return open_checkpoint(directory).config, None  # Megatron shards carry their sizes themselves
    values = read_json(path)
    if values.get("format") == FORMAT:
        stored = read_record(path, values["quantization"]) if "quantization" in values else None
        return read_native_config(path, values)[0], stored
    return ModelConfig.from_dict(official_fields(values, ignore_unknown=True)), None


def _device(name: str | None, ram: str | None) -> Device:
    memory_bytes = parse_size(ram) if ram else None
    if name is None:
        return as_device(read_machine(), measure_bandwidth(), measure_matmul(), memory_bytes)
    device = find_device(name)
    return device.with_memory(memory_bytes) if memory_bytes else device


def report_of(name: str, load: Load, device: Device) -> dict[str, Any]:
    """Everything `yuanmoe plan` says, as JSON values."""
    config, needed = load.config, memory(load)
    reading = prefill(load, device)
    return {
        "command": "plan",
        "model": name,
        "device": dataclasses.asdict(device),
        "load": {"bits": load.bits, "context": load.context, "batch": load.batch, "kv_bits": load.kv_bits},
        "quantized": None if load.stored is None else dict(load.stored.role_bits),
        "parameters": _with_total(cost.parameters(config)),
        "active_parameters": _with_total(cost.active_parameters(config)),
        "weight_bytes": {bits: _with_total(cost.weight_bytes(config, p)) for bits, p in cost.PRECISIONS.items()},
        "flops_per_token": {
            "forward": cost.forward_flops(config),
            "attention_at_context": cost.attention_flops(config, load.context),
            "training": cost.training_flops(config),
        },
        "longest_context": config.max_position_embeddings,
        "kv_bytes_per_token": cost.kv_bytes(config, load.kv_bits),
        "lfa_bytes_per_sequence": cost.lfa_bytes(config),
        "memory": dataclasses.asdict(needed) | {"total": needed.total},
        "fits": fits(load, device),
        "remedies": [dataclasses.asdict(remedy) for remedy in remedies(load, device)],
        "decode": [_batch(load, size, device) for size in sorted({*BATCHES, load.batch})],
        "prefill": None if reading is None else _speed(reading),
        "article": _article(name, config),
    }


def _with_total(by_role: dict[cost.Role, int]) -> dict[str, int]:
    return {role: count for role, count in by_role.items() if count} | {"total": sum(by_role.values())}


def _batch(load: Load, size: int, device: Device) -> dict[str, Any]:
    batch = dataclasses.replace(load, batch=size)
    most_experts = max(load.config.experts_per_layer)
    chosen = load.config.num_experts_per_tok
    return {
        "batch": size,
        "experts_read_per_layer": cost.expected_experts(most_experts, chosen, size) if most_experts else 0,
        "memory_bytes": memory(batch).total,
        "fits": fits(batch, device),
        "first_token": _speed(decode(batch, device, context=0)),
        "full_context": _speed(decode(batch, device)),
    }


def _speed(speed: Speed) -> dict[str, Any]:
    return {
        "tokens_per_s_bound": speed.bound,
        "tokens_per_s_predicted": speed.predicted,
        "limited_by": speed.limited_by,
        "bytes_read": speed.bytes_read,
    }


def _article(name: str, config: ModelConfig) -> list[dict[str, Any]]:
    peer = cost.LLAMA3_70B
    compared = ((name, cost.forward_flops(config), cost.training_flops(config)), dataclasses.astuple(peer))
    return [
        {
            "model": model,
            "forward_flops_per_token": forward,
            "training_flops_per_token": training,
            "fine_tuning_petaflops_days": cost.fine_tuning_petaflops_days(training),
        }
        for model, forward, training in compared
    ]


def _show(report: dict[str, Any], console: Console) -> None:
    device = report["device"]
    console.print(f"[bold]{report['model']}[/] on [bold]{device['name']}[/]")
    console.print(
        f"{format_size(device['memory_bytes'])}, {format_count(device['bandwidth'], 'B/s')} ({device['source']})\n"
    )
    if report["quantized"]:
        bits = ", ".join(f"{role.replace('_', ' ')} {bits}" for role, bits in report["quantized"].items())
        console.print(f"quantized, in bits: {bits}\n")
    for show in (_show_weights, _show_token, _show_memory, _show_speed, _show_article, _show_verdict):
        show(report, console)


def _show_weights(report: dict[str, Any], console: Console) -> None:
    stored, active, sizes = report["parameters"], report["active_parameters"], report["weight_bytes"]
    rows = [
        [
            role.replace("_", " "),
            f"{stored.get(role, 0):,}",
            f"{active.get(role, 0):,}",
            *(format_size(by_role.get(role, 0)) for by_role in sizes.values()),
        ]
        for role in (*cost.ROLES, "total")
        if role in stored or role in active
    ]
    print_table(console, "Parameters", ["", "stored", "active", *(f"{bits} bits" for bits in sizes)], rows)


def _show_token(report: dict[str, Any], console: Console) -> None:
    flops, context = report["flops_per_token"], report["load"]["context"]
    rows = [
        ["forward", format_count(flops["forward"], "FLOP")],
        [f"attention over {context:,} tokens, on top", format_count(flops["attention_at_context"], "FLOP")],
        ["training", format_count(flops["training"], "FLOP")],
        ["keys and values", format_size(report["kv_bytes_per_token"])],
        ["LFA state of a sequence", format_size(report["lfa_bytes_per_sequence"])],
    ]
    print_table(console, "One token", ["", "takes"], rows)


def _show_memory(report: dict[str, Any], console: Console) -> None:
    load = report["load"]
    rows = [[item.replace("_", " "), format_size(size)] for item, size in report["memory"].items()]
    rows.append(["the device has", format_size(report["device"]["memory_bytes"])])
    title = f"Memory: {load['bits']} bits, {load['batch']} x {load['context']:,} tokens"
    print_table(console, title, ["", "takes"], rows)


def _show_speed(report: dict[str, Any], console: Console) -> None:
    columns = ["", "experts", "at the start", f"at {report['load']['context']:,} tokens", "limited by", "fits"]
    rows = [
        [
            f"batch {row['batch']}",
            f"{row['experts_read_per_layer']:.1f}",
            _rate(row["first_token"]),
            _rate(row["full_context"]),
            row["full_context"]["limited_by"],
            "yes" if row["fits"] else "no",
        ]
        for row in report["decode"]
    ]
    reading = report["prefill"]
    rows.append(["prefill", "", _rate(reading), "", reading["limited_by"] if reading else "", ""])
    print_table(console, "Tokens a second: predicted / roofline bound", columns, rows)
    console.print(
        f"Predicted: kernels at {EXPECTED_SHARE:.0%} of the bound, and {1e3 * LAYER_S:.1f} ms a layer for Python.\n"
    )


def _rate(speed: dict[str, Any] | None) -> str:
    if speed is None:
        return "unknown"
    return f"{format_count(speed['tokens_per_s_predicted'])} / {format_count(speed['tokens_per_s_bound'])}"


def _show_article(report: dict[str, Any], console: Console) -> None:
    rows = [
        [
            row["model"],
            format_count(row["forward_flops_per_token"], "FLOP"),
            format_count(row["training_flops_per_token"], "FLOP"),
            f"{row['fine_tuning_petaflops_days']:.2g} PetaFLOP/s-days",
        ]
        for row in report["article"]
    ]
    title = "Compute beside Llama-3-70B (fine-tuning: 10,000 samples of 1,024 tokens)"
    print_table(console, title, ["", "inference, a token", "training, a token", "fine-tuning"], rows)


def _show_verdict(report: dict[str, Any], console: Console) -> None:
    total, available = report["memory"]["total"], report["device"]["memory_bytes"]
    context, longest = report["load"]["context"], report["longest_context"]
    if context > longest:
        console.print(f"[bold yellow]Note[/]: {context:,} tokens are more than the {longest:,} the model is made for.")
    if report["fits"]:
        console.print(f"[bold green]Fits[/]: {format_size(available - total)} to spare.")
        return
    console.print(f"[bold red]Does not fit[/]: {format_size(total - available)} too much. What would:")
    for remedy in report["remedies"]:
        console.print(f"  {remedy['options']}: {format_size(remedy['total_bytes'])}")
    if not report["remedies"]:
        console.print("  no device in the table is large enough")
