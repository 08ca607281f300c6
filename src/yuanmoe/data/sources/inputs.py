"""The files that text is read from: named ones and whole folders, in one order, with what is left out and why.

A folder is walked by name; hidden folders, `__pycache__` and files of unknown suffix are left out. A link in a folder
is followed where it leads to a file of the same folder, or of the same repository in a cache of the Hugging Face hub
(`snapshots/REVISION/NAME` -> `blobs/HASH`); every file is read once. Suffixes are compared in lower case.
Not here: what is in the files (`records.py`).
"""

import os
import stat
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from yuanmoe.data.sources.python_sources import SKIPPED_FOLDERS
from yuanmoe.errors import DataError
from yuanmoe.units import format_size

Container = Literal["lines", "parquet", "whole"]

COMPRESSED = (".gz", ".zst")
LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet",)
TEXT = (".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".csv")
SOURCE_CODE = (
    *(".py", ".pyi", ".pyx", ".ipynb", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".cuh", ".rs", ".go", ".java"),
    *(".kt", ".scala", ".swift", ".m", ".js", ".jsx", ".ts", ".tsx", ".vue", ".css", ".rb", ".php", ".pl", ".lua"),
    *(".r", ".jl", ".hs", ".ml", ".clj", ".ex", ".erl", ".sh", ".bash", ".ps1", ".sql", ".cs", ".fs", ".dart", ".zig"),
    *(".v", ".sv", ".vhd", ".f90", ".f", ".s", ".asm", ".cmake", ".toml", ".yaml", ".yml", ".json", ".proto"),
)
KNOWN = frozenset({*LINES, *PARQUET, *TEXT, *SOURCE_CODE})


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """A file to read documents from."""

    path: Path
    name: str
    """As it was given, or below the folder that was given, with slashes."""
    size: int
    modified_ns: int
    identity: tuple[int, int]
    """Device and inode: the same for all names of one file."""

    @property
    def compression(self) -> str:
        """`.gz`, `.zst` or nothing."""
        suffix = self.path.suffix.lower()
        return suffix if suffix in COMPRESSED else ""

    @property
    def holds_json(self) -> bool:
        """Whether its lines are JSON objects."""
        return _suffix(self.path.name) in LINES

    def container(self, *, one_document_a_line: bool) -> Container:
        """What the file is: lines to read apart, a table, or one document."""
        suffix = _suffix(self.path.name)
        if suffix in PARQUET:
            return "parquet"
        return "lines" if one_document_a_line or suffix in LINES else "whole"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """All files of a call, in the order in which they are read."""

    files: tuple[SourceFile, ...]
    skipped: Counter[str]
    """Reason: how many files of folders were left out for it."""

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def find_inputs(
    paths: Iterable[str | Path],
    *,
    suffixes: Collection[str] = (),
    max_document_bytes: int,
    lines: bool = False,
    skip_bad: bool = False,
) -> Inputs:
    """The files of `paths`: each named one, and those of folders that have one of `suffixes` (by default `KNOWN`).

    A file that is met again, by the same or another name, is left out and counted. With `lines` every file holds one
    document a line, so that only lines have to be short. Raises DataError when there is no file, when a named one is
    missing, a pipe, or too large to be one document, and, unless `skip_bad`, for what may not be read.
    """
    walk = _Walk(frozenset(map(_plain_suffix, suffixes)) or KNOWN, max_document_bytes, lines, skip_bad)
    files: dict[tuple[int, int], SourceFile] = {}
    for path in map(Path, paths):
        for file in walk.of_folder(path) if path.is_dir() else [walk.named(path)]:
            if files.setdefault(file.identity, file) is not file:
                walk.skipped["the same file again"] += 1
    if not files:
        left_out = ", ".join(f"{count} {reason}" for reason, count in walk.skipped.items()) or "the folders are empty"
        raise DataError(f"no files to read ({left_out}); name files, or folders with files of another --suffix")
    return Inputs(files=tuple(files.values()), skipped=walk.skipped)


class _Walk:
    """The search for files, with what it leaves out."""

    def __init__(self, suffixes: Collection[str], limit: int, lines: bool, skip_bad: bool) -> None:
        self._suffixes, self._limit, self._lines, self._skip_bad = suffixes, limit, lines, skip_bad
        self.skipped: Counter[str] = Counter()

    def named(self, path: Path) -> SourceFile:
        """A file that was asked for by name."""
        try:
            facts = path.stat()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}; name a file or a folder that is there") from error
        if not stat.S_ISREG(facts.st_mode):
            raise DataError(
                f"{path} is a pipe or a device, which can be read only once and has no size to go on after an "
                "interruption; write its output to a file first (.gz and .zst files are read as they are)"
            )
        found = _source(path, path.as_posix(), facts)
        if _too_large(found, self._limit, self._lines):
            raise DataError(
                f"{path} has {found.size} bytes, a document is at most {self._limit} (--max-document); raise that, or "
                "write its documents as lines of JSON"
            )
        return found

    def of_folder(self, root: Path) -> Iterator[SourceFile]:
        """The wanted files of a folder, by name."""
        inside = _repository(root.resolve())
        for folder, folders, names in os.walk(root, onerror=self._unreadable_folder):
            folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in SKIPPED_FOLDERS)
            for name in [name for name in folders if Path(folder, name).is_symlink()]:
                folders.remove(name)
                self.skipped["link to a folder"] += 1
            for path in (Path(folder, name) for name in sorted(names)):
                found = self._below(path, (Path(root.name) / path.relative_to(root)).as_posix(), inside)
                if isinstance(found, str):
                    self.skipped[found] += 1
                else:
                    yield found

    def _below(self, path: Path, name: str, inside: Path) -> SourceFile | str:
        """A file of a folder, or the reason to leave it out."""
        if _suffix(path.name) not in self._suffixes:
            return "other suffix"
        try:
            target = path.resolve(strict=True) if path.is_symlink() else path
            facts = path.stat()
        except (OSError, RuntimeError):  # before Python 3.13 a loop of links is a RuntimeError
            return "broken link" if path.is_symlink() else self._unreadable(path)
        if target is not path and inside not in target.parents:
            return "link out of the folder"
        if not stat.S_ISREG(facts.st_mode):
            return "no regular file"
        found = _source(path, name, facts)
        if _too_large(found, self._limit, self._lines):
            return f"larger than {format_size(self._limit)}"
        return found if os.access(path, os.R_OK) else self._unreadable(path)

    def _unreadable(self, path: Path) -> str:
        if not self._skip_bad:
            raise DataError(
                f"cannot read {path}: permission denied; allow it, or leave out what cannot be read (--skip-bad)"
            )
        return "unreadable file"

    def _unreadable_folder(self, error: OSError) -> None:
        if not self._skip_bad:
            raise DataError(
                f"cannot read the folder {error.filename}: {error.strerror}; allow it, or leave out what cannot be "
                "read (--skip-bad)"
            ) from error
        self.skipped["unreadable folder"] += 1


def _repository(folder: Path) -> Path:
    """The folder that links may lead into: `folder`, or in a cache of the hub the repository that it belongs to."""
    for parent in (folder, *folder.parents):
        if parent.name == "snapshots" and (parent.parent / "blobs").is_dir():
            return parent.parent
    return folder


def _source(path: Path, name: str, facts: os.stat_result) -> SourceFile:
    identity = (facts.st_dev, facts.st_ino)
    return SourceFile(path=path, name=name, size=facts.st_size, modified_ns=facts.st_mtime_ns, identity=identity)


def _too_large(file: SourceFile, limit: int, lines: bool) -> bool:
    return file.size > limit and file.container(one_document_a_line=lines) == "whole"


def _plain_suffix(suffix: str) -> str:
    """What `_suffix` gives for files of a suffix as a user writes it: `.PY`, `.jsonl.gz`."""
    return _suffix("file" + suffix)


def _suffix(name: str) -> str:
    """The suffix in lower case, without that of a compression."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
