"""The folder of a run: what it was asked to do, where it ran, and what it measured.

| file | holds |
|---|---|
| recipe.json | every resolved setting, written before the first step |
| environment.json | versions, machine, time and, in a checkout, the commit |
| metrics.jsonl | one JSON object a line, appended as the run goes |
| samples.jsonl | texts that the model wrote on the way, likewise |

A run that goes on after an interruption keeps the lines up to the step it goes on from, and adds to its environment
where and when it did. Not here: checkpoints, displays. No torch: reading a run must be fast.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

RECIPE, ENVIRONMENT, METRICS, SAMPLES = "recipe.json", "environment.json", "metrics.jsonl", "samples.jsonl"

PACKAGES = ("yuanmoe", "torch", "numpy", "safetensors", "tokenizers")
"""Whose versions may change a result."""


class RunFolder:
    """A run that is being written; a context manager, which closes its files."""

    def __init__(self, path: Path, recipe: Mapping[str, Any], *, resumed_at: int | None = None) -> None:
        """Begins the run: makes the folder, and replaces the run that was in it, or goes on with it after a step."""
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        here = environment()
        if resumed_at is not None:
            before = json.loads((path / ENVIRONMENT).read_text(encoding="utf-8"))
            resumed = [*before.pop("resumed", []), {"step": resumed_at, **here}]
            here = before | {"resumed": resumed}
        _write(path / ENVIRONMENT, here)
        _write(path / RECIPE, recipe)
        self._files = {name: _lines_up_to(path / name, resumed_at or 0) for name in (METRICS, SAMPLES)}

    def log(self, values: Mapping[str, Any]) -> None:
        """Appends one line of finite numbers, and hands it to the system at once."""
        self._append(METRICS, values)

    def sample(self, values: Mapping[str, Any]) -> None:
        """Appends one text that the model wrote."""
        self._append(SAMPLES, values)

    def _append(self, name: str, values: Mapping[str, Any]) -> None:
        self._files[name].write(json.dumps(values, allow_nan=False) + "\n")
        self._files[name].flush()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run folder's metrics; a last line that was cut short by a kill is left out."""
    return read_lines(path / METRICS)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The finished lines of a file of JSON objects; none where there is no file."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def _lines_up_to(file: Path, step: int) -> TextIO:
    """`file` open at its end, with the lines up to `step` alone."""
    kept = [line for line in read_lines(file) if line["step"] <= step] if step else []
    beside = file.with_name(file.name + ".partial")
    beside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(beside, file)
    return file.open("a", encoding="utf-8")


def environment() -> dict[str, Any]:
    """What of this place and moment may explain a result."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "system": platform.platform(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "commit": git_commit(Path(__file__)),
    }


def git_commit(file: Path) -> str | None:
    """The commit that `file` is checked out from, with `+` where its folder differs from it; None outside of git."""
    folder = file.parent
    try:
        # An installed package may lie in an ignored folder of a checkout of something else.
        _git(folder, "ls-files", "--error-unmatch", file.name)
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ".")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
