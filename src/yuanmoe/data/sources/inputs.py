"""The files that text is read from: named ones and whole folders, in one order, with what is left out and why.

A folder is walked by name; links, hidden folders, `__pycache__` and files of unknown suffix are left out.
Not here: what is in the files (`records.py`).
"""

import os
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

    @property
    def compression(self) -> str:
        """`.gz`, `.zst` or nothing."""
        return self.path.suffix if self.path.suffix in COMPRESSED else ""

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
    paths: Iterable[str | Path], *, suffixes: Collection[str] = (), max_document_bytes: int, lines: bool = False
) -> Inputs:
    """The files of `paths`: each named one, and those of folders that have one of `suffixes` (by default `KNOWN`).

    With `lines` every file holds one document a line, so that only lines have to be short. Raises DataError when
    there is no file, or when a named one is missing or too large to be one document.
    """
    skipped: Counter[str] = Counter()
    files: list[SourceFile] = []
    for path in map(Path, paths):
        if path.is_dir():
            wanted = frozenset(suffixes) or KNOWN
            files += _of_folder(path, wanted, max_document_bytes, lines, skipped)
        else:
            files.append(_named(path, max_document_bytes, lines))
    if not files:
        left_out = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "the folders are empty"
        raise DataError(f"no files to read ({left_out}); name files, or folders with files of another --suffix")
    return Inputs(files=tuple(files), skipped=skipped)


def _of_folder(
    root: Path, suffixes: Collection[str], limit: int, lines: bool, skipped: Counter[str]
) -> Iterator[SourceFile]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in SKIPPED_FOLDERS)
        for path in (Path(folder, name) for name in sorted(names)):
            if path.is_symlink() or not path.is_file():
                skipped["no regular file"] += 1
            elif _suffix(path.name) not in suffixes:
                skipped["other suffix"] += 1
            elif _too_large(
                found := _source(path, (Path(root.name) / path.relative_to(root)).as_posix()), limit, lines
            ):
                skipped[f"larger than {format_size(limit)}"] += 1
            else:
                yield found


def _named(path: Path, limit: int, lines: bool) -> SourceFile:
    try:
        found = _source(path, path.as_posix())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; name a file or a folder that is there") from error
    if _too_large(found, limit, lines):
        raise DataError(
            f"{path} has {found.size} bytes, a document is at most {limit} (--max-document); raise that, or write its "
            "documents as lines of JSON"
        )
    return found


def _source(path: Path, name: str) -> SourceFile:
    facts = path.stat()
    return SourceFile(path=path, name=name, size=facts.st_size, modified_ns=facts.st_mtime_ns)


def _too_large(file: SourceFile, limit: int, lines: bool) -> bool:
    return file.size > limit and file.container(one_document_a_line=lines) == "whole"


def _suffix(name: str) -> str:
    """The suffix in lower case, without that of a compression."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
