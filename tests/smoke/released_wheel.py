"""What holds of a released wheel only: `make wheel` and the wheel builds name this file, the suite does not."""

import subprocess
import sys
import sysconfig
from importlib.metadata import distribution
from pathlib import Path

import yuanmoe
from yuanmoe.ops import native

INSTALLED = Path(yuanmoe.__file__).parent


def test_it_is_the_wheel_and_not_a_source_tree():
    assert INSTALLED.parent.resolve() == Path(sysconfig.get_path("platlib")).resolve()
    tags = [line for line in distribution("yuanmoe").read_text("WHEEL").splitlines() if line.startswith("Tag:")]
    assert tags
    assert all(tag.startswith("Tag: py3-none-") and not tag.endswith("-any") for tag in tags), tags


def test_the_compiled_kernels_are_in_it_and_run():
    assert native.available(), native.reason()


def test_sources_of_the_kernels_stay_in_the_source_archive():
    assert not [path for path in INSTALLED.rglob("*") if path.suffix in (".cpp", ".h")]


def test_a_command_without_its_extra_says_how_to_get_it():
    words = [sys.executable, "-m", "yuanmoe", "serve", "--model", "small"]
    result = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode != 0
    assert "pip install 'yuanmoe[serve]'" in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.stderr
