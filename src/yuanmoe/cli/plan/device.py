"""What `yuanmoe plan` says of a model that runs on one device: one JSON object, and tables of the same object.

The numbers are `yuanmoe.plan`'s.
"""

import dataclasses
from typing import Any

from rich.console import Console

from yuanmoe.cli.terminal.output import print_table
from yuanmoe.config import ModelConfig
from yuanmoe.plan import cost
from yuanmoe.plan.device.devices import Device
from yuanmoe.plan.device.planner import (
    EXPECTED_SHARE,
    LAYER_S,
    Speed,
    Workload,
    decode_speed,
    device_remedies,
    fits,
    memory,
    prefill_speed,
)
from yuanmoe.units import format_count, format_size

BATCHES = (1, 4, 16)
"""Numbers of sequences side by side that are always shown."""


def device_report(name: str, load: Workload, device: Device) -> dict[str, Any]:
    """Everything `yuanmoe plan` says, as JSON values."""
    config, needed = load.config, memory(load)
    reading = prefill_speed(load, device)
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
        "remedies": [dataclasses.asdict(remedy) for remedy in device_remedies(load, device)],
        "decode": [_batch(load, size, device) for size in sorted({*BATCHES, load.batch})],
        "prefill": None if reading is None else _speed(reading),
        "article": _article(name, config),
    }


def _with_total(by_role: dict[cost.Role, int]) -> dict[str, int]:
    return {role: count for role, count in by_role.items() if count} | {"total": sum(by_role.values())}


def _batch(load: Workload, size: int, device: Device) -> dict[str, Any]:
    batch = dataclasses.replace(load, batch=size)
    most_experts = max(load.config.experts_per_layer)
    chosen = load.config.num_experts_per_tok
    return {
        "batch": size,
        "experts_read_per_layer": cost.expected_experts(most_experts, chosen, size) if most_experts else 0,
        "memory_bytes": memory(batch).total,
        "fits": fits(batch, device),
        "first_token": _speed(decode_speed(batch, device, context=0)),
        "full_context": _speed(decode_speed(batch, device)),
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


def show_device(report: dict[str, Any], console: Console) -> None:
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
        f"Predicted: kernels at {EXPECTED_SHARE['bandwidth']:.0%} of the bound where bandwidth limits them and at "
        f"{EXPECTED_SHARE['compute']:.0%} where compute does, and {1e3 * LAYER_S:.1f} ms a layer for Python.\n"
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
