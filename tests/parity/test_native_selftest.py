"""The kernels in C++ under the sanitizers, the AVX-512 ones over emulated instructions where the CPU has none."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from yuanmoe.ops.native import library

SOURCES = Path(library.__file__).with_name("csrc")
OURS = Path(__file__).with_name("native")
# -O0: the emulated lanes take 20 s to optimize and 1 s to run.
FLAGS = ("-std=c++17", "-O0", "-pthread", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror")
UNITS = (
    *(
        SOURCES / f"{name}.cpp"
        for name in ("portable", "avx2", "attention", "layers", "linear", "mixture", "single", "threads")
    ),
    OURS / "emulated_avx512.cpp",
    OURS / "selftest.cpp",
)


def build_and_run(folder: Path, sanitizers: str) -> subprocess.CompletedProcess[str]:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    flags = (*FLAGS, f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", f"-I{SOURCES}")

    def compile_unit(unit: Path) -> Path:
        emulated = (f"-I{OURS}",) if unit.parent == OURS else ()
        target = folder / f"{unit.stem}.o"
        subprocess.run([compiler, *flags, *emulated, "-c", unit, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as workers:
        objects = list(workers.map(compile_unit, UNITS))
    program = folder / "selftest"
    linked = subprocess.run([compiler, *flags, *objects, "-o", program], capture_output=True, text=True, check=False)
    if "cannot find" in linked.stderr:
        pytest.skip(f"the compiler has no {sanitizers} sanitizer: {linked.stderr.splitlines()[0]}")
    assert linked.returncode == 0, linked.stderr
    return subprocess.run([program], capture_output=True, text=True, check=False)


def test_variants_agree_and_stay_inside_their_buffers(tmp_path):
    result = build_and_run(tmp_path, "address,undefined")
    assert (result.returncode, result.stdout, result.stderr) == (0, "ok\n", "")
