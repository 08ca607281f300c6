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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from yuanmoe.errors import TrainingError
from yuanmoe.storage.folder import FULL, Kind, disk_errors, fcntl, write_synced
from yuanmoe.storage.json_file import json_text, read_json

LOCK = "run.lock"
RECIPE, ENVIRONMENT, METRICS, SAMPLES = "recipe.json", "environment.json", "metrics.jsonl", "samples.jsonl"

PACKAGES = ("yuanmoe", "torch", "numpy", "safetensors", "tokenizers")
"""Whose versions may change a result."""

_KIND = Kind(noun="run", proof=RECIPE, error=TrainingError)


@contextmanager
def claimed_run(path: Path) -> Iterator[None]:
    """A block in which this process alone holds the folder of a run; a process that ends in any way gives it back.

    Raises TrainingError where another one holds it. Where Python has no file locks (Windows) nothing is claimed.
    """
    if fcntl is None:
        yield
        return
    with disk_errors(path, _KIND):
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise TrainingError(
                f"{path} is being trained by process {holder}; wait for it or end it, or name another folder (--out)"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


class RunFolder:
    """A run that is being written; a context manager, which closes its files."""

    def __init__(
        self,
        path: Path,
        recipe: Mapping[str, Any],
        *,
        resumed_at: int | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        """Begins the run: makes the folder, and replaces the run that was in it, or goes on with it after a step.

        Lines for which the disk has no room are kept in memory and written with a later one; `say` is told once. Raises
        ResourceError where there is no room at the start.
        """
        self.path, self._say = path, say
        self._waiting = {METRICS: b"", SAMPLES: b""}
        self._is_full = False
        with disk_errors(path, _KIND):
            path.mkdir(parents=True, exist_ok=True)
            self._begin(recipe, resumed_at)

    def _begin(self, recipe: Mapping[str, Any], resumed_at: int | None) -> None:
        path = self.path
        here = environment()
        if resumed_at is not None:
            before = read_json(path / ENVIRONMENT) if (path / ENVIRONMENT).is_file() else {}
            resumed = [*before.pop("resumed", []), {"step": resumed_at, **here}]
            here = before | {"resumed": resumed}
        write_synced(path / ENVIRONMENT, json_text(here))
        write_synced(path / RECIPE, json_text(recipe))
        for name in self._waiting:
            _keep_lines_up_to(path / name, resumed_at or 0)
        self._files = {name: (path / name).open("ab", buffering=0) for name in self._waiting}

    def log(self, values: Mapping[str, Any]) -> None:
        """Appends one line of finite numbers, and hands it to the system at once."""
        self._append(METRICS, values)

    def sample(self, values: Mapping[str, Any]) -> None:
        """Appends one text that the model wrote."""
        self._append(SAMPLES, values)

    def _append(self, name: str, values: Mapping[str, Any]) -> None:
        self._waiting[name] += (json.dumps(values, allow_nan=False) + "\n").encode()
        self._write(name)

    def _write(self, name: str) -> None:
        try:
            while self._waiting[name]:
                written = self._files[name].write(self._waiting[name])
                self._waiting[name] = self._waiting[name][written:]
        except OSError as error:
            if error.errno not in FULL:
                raise
            if not self._is_full:
                self._is_full = True
                self._say(
                    f"the disk is full: {name} gets no lines for now. Training goes on, and they are written "
                    "once there is room"
                )

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, file in self._files.items():
            self._write(name)
            file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run folder's metrics; a last line that was cut short by a kill is left out."""
    return read_lines(path / METRICS)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The finished lines of a file of JSON objects; none where there is no file."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def _keep_lines_up_to(file: Path, step: int) -> None:
    """Takes the lines after `step` out of `file`."""
    kept = [line for line in read_lines(file) if line["step"] <= step] if step else []
    beside = file.with_name(file.name + ".partial")
    beside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(beside, file)


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
