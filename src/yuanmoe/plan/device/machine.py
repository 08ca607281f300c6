"""This machine as a device: memory, cores, CPU features, and its read bandwidth and matmul rate measured with numpy.

Facts come from /proc and /sys where Linux has them, a container's limits included (`limits.py`). A rate is the median
of a few rounds with its spread, because other programs use the memory too. Not here: anything of torch
(`cli/doctor/probe.py`).
"""

import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from yuanmoe.errors import ResourceError
from yuanmoe.plan.device.devices import Device
from yuanmoe.plan.device.limits import cpu_limits, memory_limits
from yuanmoe.units import KIB, MIB, format_size

# Matmul throughput of a core relative to its fp32 fused multiply-add, best first: multiplications in one instruction
# times its rate, from Intel's and Arm's instruction references (AMX: 1024 bf16 and 2048 int8 operations a cycle against
# 64 in fp32). AVX2 alone has an 8-bit multiply-add of twice the width.
_BF16_UNITS = {"amx_bf16": 16, "avx512_bf16": 2, "bf16": 4}
_INT8_UNITS = {"amx_int8": 32, "i8mm": 8, "avx512_vnni": 4, "avx_vnni": 4, "asimddp": 4, "avx2": 2}
_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
_ARM_FEATURES = ("asimd", "asimddp", "i8mm", "bf16", "sve")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """A measured rate: the median of several rounds, and the slowest and the fastest of them."""

    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """(fastest - slowest) / median."""
        return (self.high - self.low) / self.median


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What this machine has, as far as it tells."""

    cpu: str
    cores: int
    """That this process may use: all, those it is bound to (affinity), or what its container's quota pays for."""
    features: tuple[str, ...]
    """Instruction sets that matter here, by their Linux names; empty where the system does not list them."""
    memory_bytes: int | None
    """Physical memory, or the container's limit if lower; None where it cannot be read."""
    available_bytes: int | None
    """Memory that new programs can have without swapping, and that the container has left."""
    load: float
    """Programs that wanted a core over the last minute, on average; 0 where the system does not count them."""
    cores_limit: str = ""
    """What bounds `cores`: `affinity` or a file of the container's control group; empty where nothing does."""
    available_limit: str = ""
    """The control group's file that bounds `available_bytes`; empty where the machine itself does."""

    @property
    def is_busy(self) -> bool:
        """Whether others took so much of the machine that rates measured now are too low."""
        return self.load > self.cores / 2


def read_machine() -> Machine:
    """The facts, without measuring anything."""
    cpu = _key_values("/proc/cpuinfo", ":")
    flags = (cpu.get("flags") or cpu.get("Features") or "").split()
    memory = {key: int(value.split()[0]) * 1024 for key, value in _key_values("/proc/meminfo", ":").items()}
    groups = memory_limits(_read)
    available, available_limit = _available(memory.get("MemAvailable"), [(g.left_bytes, g.name) for g in groups])
    cores, cores_limit = _cores()
    return Machine(
        cpu=cpu.get("model name") or platform.processor() or platform.machine(),
        cores=cores,
        cores_limit=cores_limit,
        available_limit=available_limit,
        features=tuple(name for name in _FEATURES + _ARM_FEATURES if name in flags),
        memory_bytes=_lowest(memory.get("MemTotal") or _physical_memory(), *(group.limit_bytes for group in groups)),
        available_bytes=available,
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
    )


def usable_cores() -> int:
    """Cores that this process may use: bounded by affinity and by the quota of its container, at least one."""
    return _cores()[0]


def limits_in_words(machine: Machine) -> str:
    """Which limits count here, one sentence for logs and `yuanmoe doctor`."""
    cores = f"{machine.cores} cores ({machine.cores_limit or 'all of the machine'})"
    if machine.available_bytes is None:
        return f"{cores}, free memory unknown"
    return (
        f"{cores}, {format_size(machine.available_bytes)} of memory free ({machine.available_limit or 'the machine'})"
    )


def measure_bandwidth(rounds: int = 7) -> Rate:
    """Bytes a second of reading memory far larger than the caches, all cores at once."""
    # The maximum of bytes is numpy's lightest reduction, one instruction for a whole vector register, so that memory
    # and not arithmetic limits it (a plain AVX2 loop in C reads no faster).
    machine = read_machine()
    buffers = np.array_split(np.ones(_buffer_bytes(machine), dtype=np.uint8), machine.cores)
    with ThreadPoolExecutor(machine.cores) as pool:
        return measure_rate(lambda: list(pool.map(np.max, buffers)), work=sum(map(len, buffers)), rounds=rounds)


def measure_matmul(rounds: int = 5, size: int = 1024) -> Rate:
    """FLOP/s of fp32 matrix multiplication in numpy."""
    square = np.ones((size, size), dtype=np.float32)
    return measure_rate(lambda: square @ square, work=2 * size**3, rounds=rounds)


def measure_rate(action: Callable[[], object], *, work: float, rounds: int) -> Rate:
    """Work a second over several rounds of an action, after one that is not counted."""
    action()
    rates = sorted(work / _seconds(action) for _ in range(rounds))
    return Rate(median=statistics.median(rates), low=rates[0], high=rates[-1])


def as_device(machine: Machine, bandwidth: Rate, matmul: Rate, memory_bytes: int | None = None) -> Device:
    """This machine for the time model. Raises ResourceError where its memory cannot be read and none is given.

    Peaks below fp32 are the measured fp32 rate times what the CPU's 16- and 8-bit units add to it.
    """
    memory = memory_bytes or machine.memory_bytes
    if memory is None:
        raise ResourceError(
            f"cannot read how much memory this machine has ({platform.system()}); say it with --ram 24GiB"
        )
    others = f", while other programs were busy (load {machine.load:.1f})" if machine.is_busy else ""
    return Device(
        name="this machine",
        kind="cpu",
        memory_bytes=memory,
        bandwidth=bandwidth.median,
        bf16_flops=matmul.median * _best(_BF16_UNITS, machine.features),
        quantized_flops=matmul.median * _best(_INT8_UNITS, machine.features),
        source=f"measured on {machine.cores} cores of {machine.cpu}: "
        f"bandwidth within {bandwidth.spread:.0%}, matmul within {matmul.spread:.0%}{others}",
    )


def _best(units: dict[str, int], features: tuple[str, ...]) -> int:
    return max((factor for feature, factor in units.items() if feature in features), default=1)


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _buffer_bytes(machine: Machine) -> int:
    # Four times all last-level caches: a second pass must find nothing of the first. A small container gives less.
    size = max(256 * MIB, 4 * _last_level_bytes())
    return size if machine.available_bytes is None else min(size, machine.available_bytes // 4)


def _last_level_bytes() -> int:
    """All level-3 caches together, each counted once; cores share them in groups."""
    caches = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index3")
    kilobytes = {_read(cache / "id"): _read(cache / "size").strip().removesuffix("K") for cache in caches}
    return sum(KIB * int(size) for size in kilobytes.values() if size.isdigit())


def _cores() -> tuple[int, str]:
    """How many, and what bounds them."""
    everything = os.cpu_count() or 1
    found = (everything, "")
    if hasattr(os, "sched_getaffinity") and (bound := len(os.sched_getaffinity(0))) < everything:
        found = (bound, "affinity")
    # Of a core and a half one thread is paid for: a second would be stopped half of the time, and the first waits.
    quotas = [(max(1, int(limit.cores)), limit.name) for limit in cpu_limits(_read)]
    return min([found, *quotas], key=lambda each: each[0])


def _available(machine: int | None, groups: list[tuple[int, str]]) -> tuple[int | None, str]:
    """The least memory that is free, and what bounds it."""
    known = groups if machine is None else [(machine, ""), *groups]
    return min(known, key=lambda each: each[0], default=(None, ""))


def _physical_memory() -> int | None:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _lowest(*sizes: int | None) -> int | None:
    return min((size for size in sizes if size is not None), default=None)


def _key_values(path: str, separator: str) -> dict[str, str]:
    """The first value of each key of a /proc file; empty where the file is not there."""
    values: dict[str, str] = {}
    for line in _read(path).splitlines():
        key, found, value = line.partition(separator)
        if found:
            values.setdefault(key.strip(), value.strip())
    return values


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
