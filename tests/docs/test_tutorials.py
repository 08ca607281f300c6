"""The tutorials of the documentation run as written, each in an empty folder; what takes a server is only read."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIALS = Path(__file__).resolve().parents[2] / "docs" / "tutorials"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STAYS = "yuanmoe serve"
"""A command that runs until it is stopped; `test_serve_cli.py` runs such ones."""
# What a reader is assumed to have lying about.
TEXT = "A router chooses two of the experts for each token.\n" * 8


def _steps(page: Path) -> list[tuple[str, str]]:
    """Kind and text of every block: Python, or a command line."""
    found = []
    for language, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            found.append(("python", text))
        else:
            found += [("command", line) for line in text.splitlines() if line.strip()]
    return found


@pytest.mark.parametrize("page", sorted(TUTORIALS.glob("*.md")), ids=lambda page: page.stem)
def test_a_tutorial_runs_as_written(page, tmp_path):
    (tmp_path / "notes.md").write_text(TEXT)
    steps = _steps(page)
    assert steps, "the page has nothing to run"
    python = ""
    for kind, text in steps:
        if kind == "python":
            python += text
            continue
        if python:
            _run([sys.executable, "-c", python], tmp_path)
            python = ""
        program, *arguments = shlex.split(text)
        assert program == "yuanmoe", f"{page.name} runs something else: {text}"
        if not text.startswith(STAYS):
            _run([sys.executable, "-m", "yuanmoe", *arguments], tmp_path)
    if python:
        _run([sys.executable, "-c", python], tmp_path)


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, f"{' '.join(command)[:200]}\n{done.stderr[-2000:]}"
