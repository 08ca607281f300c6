"""The kernels as they are built for 64-bit ARM: the portable variant, by a cross compiler and under an emulated CPU.

`make arm64` runs this file and fails where it would skip.
"""

import shutil
import subprocess

import pytest

from kernel_selftest import SOURCES, STRICT, compile_units

COMPILER = shutil.which("aarch64-linux-gnu-g++")
CPU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
AS_SHIPPED = ("-O3", "-fvisibility=hidden")

pytestmark = [
    pytest.mark.skipif(not COMPILER, reason="no aarch64-linux-gnu-g++; Debian: apt-get install g++-aarch64-linux-gnu"),
    pytest.mark.skipif(not CPU, reason="no qemu-aarch64; Debian: apt-get install qemu-user"),
]


def test_self_test_passes_on_the_emulated_cpu(tmp_path):
    objects = compile_units(COMPILER, tmp_path, (), AS_SHIPPED)
    program = tmp_path / "selftest"
    # Static: the emulated CPU then needs none of the system's libraries for ARM.
    subprocess.run([COMPILER, "-static", "-pthread", *objects, "-o", program], check=True)
    result = subprocess.run([CPU, program], capture_output=True, text=True, check=False, timeout=600)
    assert (result.returncode, result.stdout, result.stderr) == (0, "ok\n", "")


def test_library_builds_without_a_warning_and_exports_its_interface(tmp_path):
    target = tmp_path / "libyuanmoe.so"
    sources = sorted(SOURCES.rglob("*.cpp"))
    subprocess.run(
        [COMPILER, *STRICT, *AS_SHIPPED, f"-I{SOURCES}", "-fPIC", "-shared", *sources, "-o", target], check=True
    )
    loader = tmp_path / "loader.cpp"
    loader.write_text(LOADER)
    subprocess.run([COMPILER, loader, target, f"-Wl,-rpath,{tmp_path}", "-o", tmp_path / "loader"], check=True)
    command = [CPU, "-L", "/usr/aarch64-linux-gnu", tmp_path / "loader"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stdout) == (0, "1 0 0\n"), result.stderr


# Asks the library itself which variants this CPU runs: only the portable one.
LOADER = r"""
#include <cstdint>
#include <cstdio>
extern "C" int32_t yuanmoe_supports(int32_t);
int main() { std::printf("%d %d %d\n", yuanmoe_supports(0), yuanmoe_supports(1), yuanmoe_supports(2)); }
"""
