"""The kernels' self-test (`parity/native/selftest*.cpp`): compiled here, and run by the tests of each machine."""

import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from yuanmoe.ops.native import library

SOURCES = Path(library.__file__).with_name("csrc")
SELFTEST = Path(__file__).resolve().parent / "parity" / "native"
STRICT = ("-std=c++17", "-pthread", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror")
# The emulation stands in for avx512.cpp; nothing of the self-test calls the C interface or the peak.
_LEFT_OUT = ("api", "avx512", "peak")


def units() -> list[Path]:
    """The kernels and the self-test, without what only Python calls."""
    kernels = [path for path in sorted(SOURCES.rglob("*.cpp")) if path.stem not in _LEFT_OUT]
    return [*kernels, *sorted(SELFTEST.glob("*.cpp"))]


def compile_units(compiler: str, folder: Path, flags: Sequence[str], kernel_flags: Sequence[str]) -> list[Path]:
    """The object files; `kernel_flags` are for the kernels alone, whose headers the self-test finds behind its own."""

    def compile_unit(unit: Path) -> Path:
        ours = unit.parent == SELFTEST
        target = folder / f"{unit.stem}.o"
        special = (f"-I{SELFTEST}", "-O0") if ours else kernel_flags  # optimizing the emulated lanes takes 20 s
        subprocess.run([compiler, *STRICT, *flags, *special, f"-I{SOURCES}", "-c", unit, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as workers:
        return list(workers.map(compile_unit, units()))
