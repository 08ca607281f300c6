"""The kernels in C++ under the sanitizers, the AVX-512 ones over emulated instructions where the CPU has none."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from kernel_selftest import compile_units


def build_and_run(folder: Path, sanitizers: str) -> subprocess.CompletedProcess[str]:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    flags = (f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all")
    objects = compile_units(compiler, folder, flags, ("-O0",))
    program = folder / "selftest"
    command = [compiler, "-pthread", *flags, *objects, "-o", program]
    linked = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cannot find" in linked.stderr:
        pytest.skip(f"the compiler has no {sanitizers} sanitizer: {linked.stderr.splitlines()[0]}")
    assert linked.returncode == 0, linked.stderr
    return subprocess.run([program], capture_output=True, text=True, check=False)


def test_variants_agree_and_stay_inside_their_buffers(tmp_path):
    result = build_and_run(tmp_path, "address,undefined")
    assert (result.returncode, result.stdout, result.stderr) == (0, "ok\n", "")
