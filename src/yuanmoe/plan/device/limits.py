"""What the control groups of a container leave of the machine: memory and processor time, under versions 1 and 2.

A process belongs to a group inside groups, each with limits of its own; the tightest counts. Of the memory that a group
has used, file pages that nobody read lately go when room is needed, so they count as free (as `docker stats` does).
Sources: the Linux kernel's documentation of cgroup-v1 (memory.txt, sched-bwc) and cgroup-v2. Every function takes
`read`, which gives the text of a file, or nothing where it is not there. Not here: the machine itself (`machine.py`).
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

Read = Callable[[str], str]
ROOT = "/sys/fs/cgroup"
UNLIMITED = 1 << 60
"""Version 1 writes an enormous number of bytes where there is no limit."""


class MemoryLimit(NamedTuple):
    """The bounds of one group: all that it may use, and what is left of that."""

    limit_bytes: int
    left_bytes: int
    name: str
    """The file that says so, for people."""


class CpuLimit(NamedTuple):
    """Processor time a second that a group may use, in cores."""

    cores: float
    name: str


def memory_limits(read: Read) -> list[MemoryLimit]:
    """Of every group that this process is in; empty without limits."""
    names = (("memory.max", "memory.current", "inactive_file"), ("memory.high", "memory.current", "inactive_file"))
    found = [_memory(read, folder, *files) for folder in _folders(read, "") for files in names]
    first_version = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    found += [_memory(read, folder, *first_version) for folder in _folders(read, "memory")]
    return [limit for limit in found if limit is not None]


def cpu_limits(read: Read) -> list[CpuLimit]:
    """Of every group that this process is in; empty without quotas."""
    found = []
    for folder in _folders(read, ""):
        quota, _, period = read(f"{folder}/cpu.max").strip().partition(" ")
        found.append(_cores(quota, period, f"{folder}/cpu.max"))
    for folder in _folders(read, "cpu"):
        name = f"{folder}/cpu.cfs_quota_us"
        found.append(_cores(read(name).strip(), read(f"{folder}/cpu.cfs_period_us").strip(), name))
    return [limit for limit in found if limit is not None]


def _memory(read: Read, folder: str, limit_file: str, used_file: str, reclaimable: str) -> MemoryLimit | None:
    limit, used = read(f"{folder}/{limit_file}").strip(), read(f"{folder}/{used_file}").strip()
    if not limit.isdigit() or int(limit) >= UNLIMITED:
        return None
    stat = dict(line.split()[:2] for line in read(f"{folder}/memory.stat").splitlines() if len(line.split()) > 1)
    freed = stat.get(reclaimable, "0")
    busy = max(0, (int(used) if used.isdigit() else 0) - (int(freed) if freed.isdigit() else 0))
    return MemoryLimit(int(limit), max(0, int(limit) - busy), f"{folder}/{limit_file}")


def _cores(quota: str, period: str, name: str) -> CpuLimit | None:
    # "max", and -1 in version 1, are no quota.
    if not quota.isdigit() or not period.isdigit() or int(period) == 0:
        return None
    return CpuLimit(int(quota) / int(period), name)


def _folders(read: Read, controller: str) -> Iterator[str]:
    """Where the groups of this process are, the innermost first: of a version 1 controller, or of version 2 for "".

    In a container the path may be that of the host, which is not visible: its end is tried all the same, and what is
    mounted at the root is the container's own group then.
    """
    for mount in _mounts(controller):
        parts = [part for part in _path(read, controller).split("/") if part not in ("", "..")]
        for end in range(len(parts), -1, -1):
            yield "/".join([mount, *parts[:end]])


def _mounts(controller: str) -> tuple[str, ...]:
    if not controller:
        return ROOT, f"{ROOT}/unified"
    return {"cpu": (f"{ROOT}/cpu", f"{ROOT}/cpu,cpuacct")}.get(controller, (f"{ROOT}/{controller}",))


def _path(read: Read, controller: str) -> str:
    """From /proc/self/cgroup, whose lines are `number:controllers:path`; version 2 names no controllers."""
    for line in read("/proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(","):
            return path
    return "/"
