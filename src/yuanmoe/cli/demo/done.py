"""Work in stages that need not be done twice: what a finished stage depended on, and what it found, in one file.

A stage is done again when its settings or any stage before it changed, when its outputs are gone, and when it was
interrupted: the record of a stage is dropped before the work and written after it.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yuanmoe.errors import ResourceError
from yuanmoe.storage.whole_file import write_synced

RECORD = "stages.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage that is done."""

    summary: dict[str, Any]
    """What it found, as JSON values."""
    reused: bool
    """Whether an earlier run did it."""


class FinishedStages:
    """The stages of one folder, one after another."""

    def __init__(self, folder: Path, *, fresh: bool = False) -> None:
        """With `fresh` nothing of an earlier run counts."""
        self._folder = folder
        self._done: dict[str, dict[str, Any]] = {} if fresh else _read(folder / RECORD)
        self._fingerprint = ""

    def run(
        self, name: str, settings: Mapping[str, Any], outputs: Sequence[Path], work: Callable[[], dict[str, Any]]
    ) -> Stage:
        """The next stage: `work` makes `outputs` and returns what it found, unless an earlier run did so already.

        `settings` is all that it depends on besides the stages before it. Raises ResourceError when the folder cannot
        be written.
        """
        facts = json.dumps([self._fingerprint, name, settings], sort_keys=True)
        self._fingerprint = hashlib.sha256(facts.encode()).hexdigest()
        done = self._done.get(name)
        if done and done["fingerprint"] == self._fingerprint and all(output.exists() for output in outputs):
            return Stage(summary=done["summary"], reused=True)
        try:
            self._record(name, None)
            summary = work()
            self._record(name, {"fingerprint": self._fingerprint, "summary": summary})
        except OSError as error:
            raise ResourceError(
                f"cannot write {error.filename or self._folder}: {error.strerror}; make room or choose another folder, "
                "then run the same command again to go on"
            ) from error
        return Stage(summary=summary, reused=False)

    def _record(self, name: str, done: dict[str, Any] | None) -> None:
        self._done = {key: value for key, value in self._done.items() if key != name}
        if done is not None:
            self._done[name] = done
        self._folder.mkdir(parents=True, exist_ok=True)
        write_synced(self._folder / RECORD, json.dumps(self._done, indent=2) + "\n")


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """The record; nothing where it is missing or damaged, since every stage can be done again."""
    try:
        stages = json.loads(file.read_text(encoding="utf-8"))
        return {name: {"fingerprint": done["fingerprint"], "summary": done["summary"]} for name, done in stages.items()}
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return {}
