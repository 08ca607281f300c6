"""Building without a compiler: a package without kernels for oneself, and never a release that lacks them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def build_kernels(folder, **environment):
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        str(folder),
        "--build-temp",
        str(folder / "temp"),
    ]
    missing = dict.fromkeys(("CC", "CXX"), str(folder / "no-compiler"))
    variables = {**os.environ, **missing, "YUANMOE_RELEASE": "0", **environment}
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False, timeout=120)


def test_a_release_without_a_compiler_fails(tmp_path):
    result = build_kernels(tmp_path, YUANMOE_RELEASE="1")
    assert result.returncode != 0
    assert "no-compiler" in result.stderr


def test_an_own_build_without_a_compiler_leaves_the_kernels_out(tmp_path):
    result = build_kernels(tmp_path)
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.rglob("*.so"))
    assert 'building extension "yuanmoe.ops.native.libyuanmoe" failed' in result.stderr
