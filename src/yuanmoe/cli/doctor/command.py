"""`yuanmoe doctor`: what this machine has, what is missing, what to do about it, and which models would run here.

A finding is `broken` when nothing can run (exit code 1) and `advice` when something could run better.
"""

import dataclasses
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from yuanmoe.cli.terminal.output import Json, people, print_result, print_table
from yuanmoe.config import ModelConfig
from yuanmoe.estimate import read_model
from yuanmoe.plan.cost import PRECISIONS, Precision, weight_bytes
from yuanmoe.plan.device.devices import Device
from yuanmoe.plan.device.machine import Machine, as_device, measure_bandwidth, measure_matmul, read_machine
from yuanmoe.plan.device.planner import decode_speed, fits, memory, workload_of
from yuanmoe.presets import PRESETS, preset
from yuanmoe.units import format_count, format_size

REQUIRED = ("torch", "numpy", "safetensors", "sentencepiece", "tokenizers", "typer", "rich")
EXTRAS = ("transformers", "peft")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something to do."""

    level: Literal["broken", "advice"]
    what: str
    do: str


def doctor(
    model: Annotated[
        str | None, typer.Option(help="A checkpoint directory too: whether it would run here, and how fast.")
    ] = None,
    json_only: Json = False,
) -> None:
    """Say what this machine has, what is missing and what to do; a few seconds of measuring."""
    machine = read_machine()
    bandwidth, matmul = measure_bandwidth(), measure_matmul()
    torch_facts, gpus = probe()
    report = {
        "command": "doctor",
        "python": {"version": platform.python_version(), "executable": sys.executable, "platform": platform.platform()},
        "machine": dataclasses.asdict(machine) | {"disk_free_bytes": shutil.disk_usage(Path.cwd()).free},
        "measured": {"read_bandwidth": dataclasses.asdict(bandwidth), "fp32_matmul": dataclasses.asdict(matmul)},
        "torch": torch_facts,
        "packages": {name: installed(name) for name in (*REQUIRED, *EXTRAS)},
        "threads": {name: os.environ.get(name) for name in THREAD_VARIABLES},
    }
    here = [as_device(machine, bandwidth, matmul)] if machine.memory_bytes else []
    models = [(name, preset(name), None) for name in PRESETS] + ([read_model(model)] if model else [])
    report["models"] = [runnable(*each, device) for device in (*here, *gpus) for each in models]
    findings = [*missing_parts(report), *slow(machine, report)]
    report["findings"] = [dataclasses.asdict(finding) for finding in findings]
    if not json_only:
        _show(report, people())
    print_result(report, json_only)
    if any(finding.level == "broken" for finding in findings):
        raise typer.Exit(1)


# --- facts ------------------------------------------------------------------------------------------------------------


def probe() -> tuple[dict[str, Any], list[Device]]:
    """What torch finds, with the seconds that importing it took (or only the `error`), and its GPUs."""
    start = time.perf_counter()
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:
        return {"error": str(error)}, []
    import_s = time.perf_counter() - start
    from yuanmoe.cli.doctor.probe import probe_torch

    facts = probe_torch()
    return dataclasses.asdict(facts) | {"import_s": import_s}, [gpu.as_device() for gpu in facts.gpus]


def installed(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def runnable(name: str, config: ModelConfig, stored: Precision | None, device: Device) -> dict[str, Any]:
    """A model on a device, as it is stored or with the most bits that fit, and one sequence of the full context."""
    context = config.max_position_embeddings
    load = workload_of(config, stored, device, context=context)
    speed = decode_speed(load, device, context=0)
    return {
        "model": name,
        "device": device.name,
        "bits": load.bits,
        "context": context,
        "fits": fits(load, device),
        "memory_bytes": memory(load).total,
        "tokens_per_s_bound": speed.bound,
        "tokens_per_s_predicted": speed.predicted,
    }


# --- findings ---------------------------------------------------------------------------------------------------------


def missing_parts(report: dict[str, Any]) -> Iterator[Finding]:
    """What is not installed, or installed and unusable."""
    for name in REQUIRED:
        if report["packages"][name] is None:
            yield Finding(level="broken", what=f"{name} is not installed", do="pip install yuanmoe")
    facts = report["torch"]
    if "error" in facts and report["packages"]["torch"]:
        yield Finding(
            level="broken", what=f"torch does not import: {facts['error']}", do="pip install --force-reinstall torch"
        )
    for name in EXTRAS:
        if report["packages"][name] is None:
            yield Finding(level="advice", what=f"{name} is not installed", do=f"pip install {name}, if you want it")
    if shutil.which("nvidia-smi") and not facts.get("gpus"):
        yield Finding(
            level="advice",
            what=f"an NVIDIA driver is here, but torch (build: {facts.get('build', 'none')}) sees no GPU",
            do="install a CUDA build of torch: https://pytorch.org/get-started/locally/",
        )


def slow(machine: Machine, report: dict[str, Any]) -> Iterator[Finding]:
    """What costs speed or stands in the way of the large models."""
    if machine.features and "avx2" not in machine.features and "asimddp" not in machine.features:
        yield Finding(level="advice", what="this CPU has neither AVX2 nor Arm dot products", do="expect slow answers")
    if report["torch"].get("kernels_reason"):
        yield Finding(level="advice", what="compiled kernels are missing or slow", do=report["torch"]["kernels_reason"])
    threads = report["torch"].get("threads", machine.cores)
    if threads != machine.cores:
        yield Finding(
            level="advice",
            what=f"torch uses {threads} threads on {machine.cores} cores",
            do=f"set OMP_NUM_THREADS={machine.cores}",
        )
    if machine.is_busy:
        yield Finding(
            level="advice",
            what=f"other programs were busy (load {machine.load:.1f} on {machine.cores} cores): measured rates are low",
            do="ask again when they are done",
        )
    free, official = report["machine"]["disk_free_bytes"], sum(weight_bytes(preset("m32"), PRECISIONS[16]).values())
    if free < 2 * official:
        yield Finding(
            level="advice",
            what=f"{format_size(free)} of disk are free here; M32 beside its converted copy takes "
            f"{format_size(2 * official)}",
            do="convert it on another disk",
        )


# --- for people -------------------------------------------------------------------------------------------------------


def _show(report: dict[str, Any], console: Console) -> None:
    print_table(console, "This machine", ["", ""], _machine_rows(report))
    print_table(console, "Torch", ["", ""], _torch_rows(report["torch"]))
    packages = [[name, found or "not installed"] for name, found in report["packages"].items()]
    print_table(console, "Packages", ["", "version"], packages)
    columns = ["", "on", "bits", "memory", "tokens/s, predicted / bound"]
    print_table(console, "What would run", columns, [_model_row(row) for row in report["models"]])
    for finding in report["findings"]:
        colour = "red" if finding["level"] == "broken" else "yellow"
        console.print(f"[bold {colour}]{finding['level']}[/]: {finding['what']}; {finding['do']}")
    if not report["findings"]:
        console.print("[bold green]Nothing is missing.[/]")


def _limit(name: str) -> str:
    """What bounds a number, where it is not the machine."""
    return f" (limited by {name})" if name else ""


def _machine_rows(report: dict[str, Any]) -> list[list[str]]:
    machine, measured = report["machine"], report["measured"]
    threads = ", ".join(f"{name}={value}" for name, value in report["threads"].items() if value)
    return [
        ["python", report["python"]["version"]],
        ["system", report["python"]["platform"]],
        ["processor", f"{machine['cores']} cores{_limit(machine['cores_limit'])} of {machine['cpu']}"],
        ["instruction sets", " ".join(machine["features"]) or "unknown"],
        [
            "memory",
            f"{_size(machine['memory_bytes'])}, {_size(machine['available_bytes'])} available"
            + _limit(machine["available_limit"]),
        ],
        ["disk free here", format_size(machine["disk_free_bytes"])],
        ["memory read", _rate(measured["read_bandwidth"], "B/s")],
        ["fp32 matmul (numpy)", _rate(measured["fp32_matmul"], "FLOP/s")],
        ["thread settings", threads or "none"],
    ]


def _torch_rows(facts: dict[str, Any]) -> list[list[str]]:
    if "error" in facts:
        return [["import failed", facts["error"]]]
    bf16 = "with instructions of the CPU" if facts["bf16_instructions"] else "widened to fp32"
    rows = [
        ["version", f"{facts['version']}, build {facts['build']}"],
        ["import", f"{facts['import_s']:.1f} s"],
        ["threads", str(facts["threads"])],
        ["fp32 matmul", _rate(facts["fp32_flops"], "FLOP/s")],
        [f"bf16 matmul, {bf16}", _rate(facts["bf16_flops"], "FLOP/s")],
        ["compiled kernels", "none, torch's own are used" if facts["kernels"] == "torch" else facts["kernels"]],
    ]
    for gpu in facts["gpus"]:
        rows.append([f"{gpu['name']} ({gpu['capability']})", format_size(gpu["memory_bytes"])])
        rows.append(["  memory read", _rate(gpu["bandwidth"], "B/s")])
        rows.append(["  bf16 matmul", _rate(gpu["bf16_flops"], "FLOP/s")])
    return rows if facts["gpus"] else [*rows, ["GPUs", "none"]]


def _model_row(row: dict[str, Any]) -> list[str]:
    speed = f"{format_count(row['tokens_per_s_predicted'])} / {format_count(row['tokens_per_s_bound'])}"
    size = format_size(row["memory_bytes"])
    return [row["model"], row["device"], str(row["bits"]), size, speed if row["fits"] else "does not fit"]


def _rate(rate: dict[str, float], unit: str) -> str:
    span = f"{format_count(rate['low'])} to {format_count(rate['high'])}"
    return f"{format_count(rate['median'], unit)} ({span})"


def _size(size: int | None) -> str:
    return "unknown" if size is None else format_size(size)
