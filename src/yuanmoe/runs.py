"""The folder of a run: what it was asked to do, where it ran, and what it measured.

| file | holds |
|---|---|
| recipe.json | every resolved setting, written before the first step |
| environment.json | versions, machine, time and, in a checkout, the commit |
| metrics.jsonl | one JSON object a line, appended as the run goes |

Not here: checkpoints, displays. No torch: reading a run must be fast.
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
from typing import Any

RECIPE, ENVIRONMENT, METRICS = "recipe.json", "environment.json", "metrics.jsonl"

PACKAGES = ("yuanmoe", "torch", "numpy", "safetensors", "tokenizers")
"""Whose versions may change a result."""


class RunFolder:
    """A run that is being written; a context manager, which closes its metrics."""

    def __init__(self, path: Path, recipe: Mapping[str, Any]) -> None:
        """Begins the run: makes the folder, and replaces the run that was in it."""
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._metrics = (path / METRICS).open("w", encoding="utf-8")
        _write(path / RECIPE, recipe)
        _write(path / ENVIRONMENT, environment())

    def log(self, values: Mapping[str, Any]) -> None:
        """Appends one line of finite numbers, and hands it to the system at once."""
        self._metrics.write(json.dumps(values, allow_nan=False) + "\n")
        self._metrics.flush()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._metrics.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run folder's metrics; a last line that was cut short by a kill is left out."""
    lines = (path / METRICS).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


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
