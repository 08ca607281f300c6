"""What a container leaves of a machine: used memory counts, file pages that can go do not, the tightest limit wins."""

import os

import pytest
import torch

from yuanmoe.ops import threads
from yuanmoe.plan.device import machine
from yuanmoe.plan.device.limits import cpu_limits, memory_limits
from yuanmoe.units import GIB

ROOT = "/sys/fs/cgroup"
V2 = f"{ROOT}/memory.max"


def memory_v2(folder: str, limit: object, used: int, inactive: int = 0) -> dict[str, str]:
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": f"anon {used - inactive}\ninactive_file {inactive}\nactive_file 0\n",
    }


def memory_v1(folder: str, limit: int, used: int, inactive: int = 0) -> dict[str, str]:
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{used}\n",
        f"{folder}/memory.stat": f"inactive_file 1\ntotal_inactive_file {inactive}\n",
    }


SLICE = f"{ROOT}/user.slice"
SCOPE = f"{SLICE}/job.scope"
MEMORY_CASES = {
    "used memory is not free": (memory_v2(ROOT, 8 * GIB, 7 * GIB), GIB, V2),
    "file pages can go": (memory_v2(ROOT, 8 * GIB, 7 * GIB, 5 * GIB), 6 * GIB, V2),
    "over the limit is nothing": (memory_v2(ROOT, 8 * GIB, 9 * GIB), 0, V2),
    "without a limit the machine counts": (memory_v2(ROOT, "max", 7 * GIB), 200 * GIB, ""),
    "a limit above the machine": (memory_v2(ROOT, 900 * GIB, 7 * GIB), 200 * GIB, ""),
    "a group above is the tightest": (
        {"/proc/self/cgroup": "0::/user.slice/job.scope\n"}
        | memory_v2(SCOPE, "max", GIB)
        | memory_v2(SLICE, 4 * GIB, 3 * GIB),
        GIB,
        f"{SLICE}/memory.max",
    ),
    "a group below is": (
        {"/proc/self/cgroup": "0::/user.slice/job.scope\n"}
        | memory_v2(SCOPE, 2 * GIB, GIB // 2)
        | memory_v2(SLICE, 4 * GIB, 2 * GIB),
        3 * GIB // 2,
        f"{SCOPE}/memory.max",
    ),
    "memory.high slows down before": (
        memory_v2(ROOT, 8 * GIB, 4 * GIB) | {f"{ROOT}/memory.high": f"{5 * GIB}\n"},
        GIB,
        f"{ROOT}/memory.high",
    ),
    "version 1": (
        memory_v1(f"{ROOT}/memory", 8 * GIB, 7 * GIB, GIB),
        2 * GIB,
        f"{ROOT}/memory/memory.limit_in_bytes",
    ),
    "version 1, nested": (
        {"/proc/self/cgroup": "11:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n"}
        | memory_v1(f"{ROOT}/memory", 1 << 62, 90 * GIB)
        | memory_v1(f"{ROOT}/memory/docker/abc", 8 * GIB, 6 * GIB),
        2 * GIB,
        f"{ROOT}/memory/docker/abc/memory.limit_in_bytes",
    ),
    "version 1, the path of the host is not here": (
        {"/proc/self/cgroup": "11:memory:/docker/abc\n"} | memory_v1(f"{ROOT}/memory", 8 * GIB, 6 * GIB),
        2 * GIB,
        f"{ROOT}/memory/memory.limit_in_bytes",
    ),
    "damaged files": ({V2: f"{8 * GIB}\n", f"{ROOT}/memory.current": "?\n"}, 8 * GIB, V2),
}


def use(monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    known = {"/proc/meminfo": f"MemTotal: {300 * GIB // 1024} kB\nMemAvailable: {200 * GIB // 1024} kB\n"} | files
    monkeypatch.setattr(machine, "_read", lambda path: known.get(str(path), ""))


@pytest.mark.parametrize("name", MEMORY_CASES)
def test_available_memory_is_what_the_tightest_group_has_left(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    files, left, limit = MEMORY_CASES[name]
    use(monkeypatch, files)
    found = machine.read_machine()
    assert (found.available_bytes, found.available_limit) == (left, limit)


CPU_CASES = {
    "none": ({f"{ROOT}/cpu.max": "max 100000\n"}, 16, ""),
    "two cores": ({f"{ROOT}/cpu.max": "200000 100000\n"}, 2, f"{ROOT}/cpu.max"),
    "a core and a half": ({f"{ROOT}/cpu.max": "150000 100000\n"}, 1, f"{ROOT}/cpu.max"),
    "less than one": ({f"{ROOT}/cpu.max": "20000 100000\n"}, 1, f"{ROOT}/cpu.max"),
    "more than there are": ({f"{ROOT}/cpu.max": "9900000 100000\n"}, 16, ""),
    "a group above": (
        {"/proc/self/cgroup": "0::/a/b\n", f"{ROOT}/a/cpu.max": "300000 100000\n", f"{ROOT}/a/b/cpu.max": "max 100000"},
        3,
        f"{ROOT}/a/cpu.max",
    ),
    "version 1": (
        {f"{ROOT}/cpu/cpu.cfs_quota_us": "400000\n", f"{ROOT}/cpu/cpu.cfs_period_us": "100000\n"},
        4,
        f"{ROOT}/cpu/cpu.cfs_quota_us",
    ),
    "version 1, nested in cpu,cpuacct": (
        {
            "/proc/self/cgroup": "4:cpu,cpuacct:/docker/abc\n",
            f"{ROOT}/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "250000\n",
            f"{ROOT}/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "50000\n",
        },
        5,
        f"{ROOT}/cpu,cpuacct/docker/abc/cpu.cfs_quota_us",
    ),
    "version 1 without": (
        {f"{ROOT}/cpu/cpu.cfs_quota_us": "-1\n", f"{ROOT}/cpu/cpu.cfs_period_us": "100000\n"},
        16,
        "",
    ),
}


@pytest.mark.parametrize("name", CPU_CASES)
def test_cores_are_those_that_the_tightest_quota_pays_for(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    files, cores, limit = CPU_CASES[name]
    use(monkeypatch, files)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    found = machine.read_machine()
    assert (found.cores, found.cores_limit) == (cores, limit)
    assert machine.usable_cores() == cores


def test_affinity_counts_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, {f"{ROOT}/cpu.max": "500000 100000\n"})
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    found = machine.read_machine()
    assert (found.cores, found.cores_limit) == (2, "affinity")
    assert machine.limits_in_words(found) == "2 cores (affinity), 200 GiB of memory free (the machine)"


def test_no_control_groups_are_no_limits() -> None:
    assert memory_limits(lambda _: "") == []
    assert cpu_limits(lambda _: "") == []


def test_threads_are_not_more_than_the_quota_pays_for(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        monkeypatch.setattr(threads, "usable_cores", lambda: 1)
        assert threads.use_threads() == torch.get_num_threads() == 1
        assert threads.use_threads(2) == torch.get_num_threads() == 2
        monkeypatch.setattr(threads, "usable_cores", lambda: 64)
        assert threads.use_threads() == 2
    finally:
        torch.set_num_threads(before)
