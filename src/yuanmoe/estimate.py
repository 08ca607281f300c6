"""Whether a model fits a device and how fast it can be there, for a model that is named or lies in a folder.

The library's `yuanmoe.plan`. Not here: counting and rooflines (`plan/`), clusters (`plan/cluster/`), tables for
people (`cli/plan/`).
"""

from dataclasses import dataclass
from pathlib import Path

from yuanmoe.config import ModelConfig
from yuanmoe.errors import UsageError
from yuanmoe.plan.cost import Precision
from yuanmoe.plan.device.devices import Device, find_device
from yuanmoe.plan.device.machine import as_device, measure_bandwidth, measure_matmul, read_machine
from yuanmoe.plan.device.planner import (
    Memory,
    Remedy,
    Speed,
    Workload,
    decode_speed,
    device_remedies,
    fits,
    memory,
    prefill_speed,
    workload_of,
)
from yuanmoe.presets import PRESETS, find_preset, preset
from yuanmoe.shipped import model_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlan:
    """What running a model on a device takes."""

    model: str
    config: ModelConfig
    device: Device
    workload: Workload
    """Bits of the weights, tokens of context, sequences at once."""
    memory: Memory
    """In bytes, with every sequence at its full context."""
    fits: bool
    decode: Speed
    """Tokens a second over all sequences, at their full context."""
    prefill: Speed | None
    """Tokens a second of a prompt; None where the device's matmul rate is unknown."""
    remedies: tuple[Remedy, ...]
    """Changes with which the model would fit; empty where it does."""


def plan_model(
    model: str | Path,
    *,
    bits: int | None = None,
    context: int | None = None,
    batch: int = 1,
    kv_bits: int = 16,
    device: str | Device | None = None,
    memory_bytes: int | None = None,
) -> DevicePlan:
    """Whether a model fits, how fast it can be and what it takes, without loading it.

    `model` is a folder with a config.json, the shipped model's name, or a preset. `bits` are 16, 8 or 4; by default
    those of a quantized checkpoint, or the most that fit. `context` is in tokens, by default the model's longest.
    `device` is a name such as `rtx-4090`, by default this machine's CPU, which is measured in about a second;
    `memory_bytes` replaces the memory that it has. Raises UsageError, and CheckpointError or ConfigError for a folder.
    """
    name, config, stored = read_model(model)
    target = device if isinstance(device, Device) else device_named(device, memory_bytes)
    longest = config.max_position_embeddings if context is None else context
    load = workload_of(config, stored, target, context=longest, batch=batch, kv_bits=kv_bits)
    load = load if bits is None else load.with_bits(bits)
    return DevicePlan(
        model=name,
        config=config,
        device=target,
        workload=load,
        memory=memory(load),
        fits=fits(load, target),
        decode=decode_speed(load, target),
        prefill=prefill_speed(load, target),
        remedies=tuple(device_remedies(load, target)),
    )


def read_model(model: str | Path) -> tuple[str, ModelConfig, Precision | None]:
    """A name and a configuration: of a preset, or of a checkpoint folder of any format, and how it is quantized.

    Raises UsageError when it is neither, and what opening a checkpoint raises.
    """
    folder = model_folder(model)
    if folder.is_dir():
        # Checkpoints know torch's dtypes, and importing torch takes seconds; a preset needs none of it.
        from yuanmoe.checkpoint.open import read_config

        return folder.resolve().name, *read_config(folder)
    name = find_preset(str(model))
    if name is None:
        raise UsageError(f"{str(model)!r} is neither a directory nor a preset; presets: {', '.join(PRESETS)}")
    return name, preset(name), None


def device_named(name: str | None, memory_bytes: int | None = None) -> Device:
    """A device of the table, or this machine's CPU, measured; with other memory where some is named."""
    if name is None:
        return as_device(read_machine(), measure_bandwidth(), measure_matmul(), memory_bytes)
    device = find_device(name)
    return device.with_memory(memory_bytes) if memory_bytes else device
