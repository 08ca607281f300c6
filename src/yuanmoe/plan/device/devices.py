"""The properties of a device that the time model uses, and a table of named devices with vendor numbers.

Rates of the table are peaks: dense (no sparsity) bf16 tensor throughput with fp32 accumulation, and memory bandwidth of
the data sheet. Vendors' gigabytes of device memory are GiB. Not here: this machine (`machine.py`).
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from yuanmoe.errors import UsageError
from yuanmoe.hints import did_you_mean
from yuanmoe.units import GIB

Kind = Literal["cpu", "gpu", "unified"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One processor with its memory."""

    name: str
    kind: Kind
    """`unified` is a CPU and GPU over one memory."""
    memory_bytes: int
    bandwidth: float
    """Bytes a second that reading memory can reach."""
    bf16_flops: float | None
    """FLOP/s of matrix multiplication with 16-bit weights; None where the vendor publishes none."""
    quantized_flops: float | None = None
    """FLOP/s with 8- and 4-bit weights on integer units; None: these weights are multiplied as bf16."""
    source: str
    """Where the numbers come from."""

    def peak_flops(self, bits: int) -> float | None:
        """FLOP/s of matrix multiplication with weights of so many bits."""
        return self.bf16_flops if bits == 16 else self.quantized_flops or self.bf16_flops

    def with_memory(self, memory_bytes: int) -> "Device":
        """This device with another amount of memory in bytes."""
        return dataclasses.replace(self, memory_bytes=memory_bytes)


def _nvidia(name: str, gib: int, bandwidth: float, flops: float, source: str) -> Device:
    return Device(
        name=name, kind="gpu", memory_bytes=gib * GIB, bandwidth=bandwidth, bf16_flops=flops, source=f"NVIDIA {source}"
    )


def _mac(name: str, gib: int, bandwidth: float) -> Device:
    source = "Apple technical specifications; no matmul rate is published"
    return Device(
        name=name, kind="unified", memory_bytes=gib * GIB, bandwidth=bandwidth, bf16_flops=None, source=source
    )


_TABLE = (
    Device(
        name="laptop-16",
        kind="cpu",
        memory_bytes=16 * GIB,
        bandwidth=51.2e9,
        bf16_flops=768e9,
        quantized_flops=1536e9,
        source="two channels of DDR4-3200 (25.6 GB/s each); 8 AVX2 cores at 3 GHz, 32 fp32 FLOP a cycle",
    ),
    Device(
        name="24gib-2core",
        kind="cpu",
        memory_bytes=24 * GIB,
        bandwidth=33e9,
        bf16_flops=372e9,
        quantized_flops=745e9,
        source="measured on two AVX-512 cores: read bandwidth and int8 matmul; bf16 is half of int8",
    ),
    _mac("mac-m4-16", 16, 120e9),
    _mac("mac-m4-pro-24", 24, 273e9),
    _mac("mac-m4-pro-48", 48, 273e9),
    _mac("mac-m4-max-64", 64, 546e9),
    _mac("mac-m4-max-128", 128, 546e9),
    _nvidia("rtx-3090", 24, 936e9, 71e12, "GA102 white paper"),
    _nvidia("rtx-4090", 24, 1008e9, 165.2e12, "Ada white paper"),
    _nvidia("rtx-5090", 32, 1792e9, 209.5e12, "RTX Blackwell white paper"),
    _nvidia("l40s", 48, 864e9, 362e12, "L40S data sheet"),
    _nvidia("a100-80", 80, 2039e9, 312e12, "A100 SXM data sheet"),
    _nvidia("h100-80", 80, 3350e9, 989e12, "H100 SXM data sheet"),
    _nvidia("h200", 141, 4800e9, 989e12, "H200 SXM data sheet"),
)

DEVICES = {device.name: device for device in _TABLE}


def find_device(name: str) -> Device:
    """A device of the table, case-insensitive. Raises UsageError for an unknown name."""
    device = DEVICES.get(name.lower())
    if device is None:
        hint = did_you_mean(name.lower(), DEVICES, otherwise=f"known devices: {', '.join(DEVICES)}")
        raise UsageError(f"unknown device {name!r}; {hint}")
    return device
