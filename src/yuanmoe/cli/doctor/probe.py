"""What torch can do on this machine: its build, its threads, its GPUs, and matmul and memory rates measured with it.

Importing this file imports torch. Not here: what needs no torch (`yuanmoe.plan.device.machine`).
"""

from dataclasses import dataclass

import torch

from yuanmoe.ops import native
from yuanmoe.ops.products.linear import linear
from yuanmoe.ops.products.wide import has_bfloat16_matmul
from yuanmoe.plan.device.devices import Device
from yuanmoe.plan.device.machine import Rate, measure_rate
from yuanmoe.units import GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One CUDA (or ROCm) device, measured."""

    name: str
    memory_bytes: int
    capability: str
    bandwidth: Rate
    bf16_flops: Rate

    def as_device(self) -> Device:
        """The GPU for the time model."""
        return Device(
            name=self.name,
            kind="gpu",
            memory_bytes=self.memory_bytes,
            bandwidth=self.bandwidth.median,
            bf16_flops=self.bf16_flops.median,
            source="measured with torch",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchFacts:
    """This installation of torch."""

    version: str
    build: str
    """`cpu`, `cuda 12.8` or `rocm 6.4`."""
    threads: int
    fp32_flops: Rate
    """Of the CPU, as `bf16_flops`."""
    bf16_flops: Rate
    bf16_instructions: bool
    """Whether the CPU multiplies bf16 itself; otherwise our products widen to fp32."""
    gpus: tuple[Gpu, ...]
    kernels: str
    """The variant of our compiled kernels that runs here; `torch` where there are none."""
    kernels_reason: str
    """Why no faster one, with the way out; empty where there is none faster."""


def probe_torch() -> TorchFacts:
    """The facts and rates; about a second on two cores."""
    cpu = torch.device("cpu")
    return TorchFacts(
        version=torch.__version__,
        build=_build(),
        threads=torch.get_num_threads(),
        fp32_flops=matmul_rate(cpu, torch.float32, size=1024),
        bf16_flops=matmul_rate(cpu, torch.bfloat16, size=1024),
        bf16_instructions=has_bfloat16_matmul(),
        gpus=tuple(_gpu(index) for index in range(torch.cuda.device_count())),
        kernels=native.variant(),
        kernels_reason=native.reason(),
    )


def matmul_rate(device: torch.device, dtype: torch.dtype, *, size: int, rounds: int = 5) -> Rate:
    """FLOP/s of a square linear layer on as many tokens, as the model computes it."""
    square = torch.ones(size, size, dtype=dtype, device=device)

    def multiply() -> None:
        linear(square, square)
        _wait(device)

    return measure_rate(multiply, work=2 * size**3, rounds=rounds)


def read_rate(device: torch.device, *, size_bytes: int = GIB, rounds: int = 5) -> Rate:
    """Bytes a second of reading device memory."""
    numbers = torch.ones(size_bytes // 4, device=device)

    def read() -> None:
        numbers.sum()
        _wait(device)

    return measure_rate(read, work=4 * numbers.numel(), rounds=rounds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _build() -> str:
    if torch.version.cuda:
        return f"cuda {torch.version.cuda}"
    return f"rocm {torch.version.hip}" if torch.version.hip else "cpu"


def _gpu(index: int) -> Gpu:
    device = torch.device("cuda", index)
    properties = torch.cuda.get_device_properties(device)
    return Gpu(
        name=properties.name,
        memory_bytes=properties.total_memory,
        capability=f"{properties.major}.{properties.minor}",
        bandwidth=read_rate(device),
        bf16_flops=matmul_rate(device, torch.bfloat16, size=8192),
    )
