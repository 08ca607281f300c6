"""Python sources that are on the machine, as documents to train on: real text, with nothing to download.

The same files give the same documents in the same order. Not here: tokens (`tokenizer`), batches (training).
"""

import hashlib
import logging
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from yuanmoe.errors import UsageError

# Installed packages are nobody's standard library, and differ from machine to machine.
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text to learn from."""

    name: str
    """Path below the root it was found in, with slashes."""
    text: str


def iter_python_sources(
    roots: Iterable[str | Path], *, skip_tests: bool = True, max_file_bytes: int = 2**18, max_bytes: int | None = None
) -> Iterator[Document]:
    """Every different `.py` file below `roots`, root by root, by path.

    Left out: files above `max_file_bytes` (tables, mostly), files that are no UTF-8, empty ones, links, hidden folders
    and, with `skip_tests`, folders of tests. Ends before the file that would exceed `max_bytes` in all. Raises
    UsageError for a root that is no folder.
    """
    skipped = SKIPPED_FOLDERS | (TEST_FOLDERS if skip_tests else frozenset())
    seen: set[bytes] = set()
    total_bytes = 0
    for root in map(Path, roots):
        if not root.is_dir():
            raise UsageError(f"{root} is not a folder; give folders that hold .py files")
        for path in _python_files(root, skipped):
            content = _content(path, max_file_bytes)
            digest = hashlib.blake2b(content).digest()
            text = _text(content)
            if not text.strip() or digest in seen:
                continue
            total_bytes += len(content)
            if max_bytes is not None and total_bytes > max_bytes:
                return
            seen.add(digest)
            yield Document(name=path.relative_to(root).as_posix(), text=text)


def stdlib_documents(*, max_bytes: int | None = None) -> Iterator[Document]:
    """The standard library of the Python that runs this, without its tests: about 11 MB in Python 3.11."""
    return iter_python_sources([sysconfig.get_path("stdlib")], max_bytes=max_bytes)


def _python_files(root: Path, skipped: frozenset[str]) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in skipped and not name.startswith("."))
        paths = (Path(folder, name) for name in sorted(files) if name.lower().endswith(".py"))
        yield from (path for path in paths if path.is_file() and not path.is_symlink())


def read_source(path: Path, max_file_bytes: int) -> str:
    """A file's text with plain newlines; empty where it is too large, cannot be read or is no UTF-8."""
    return _text(_content(path, max_file_bytes))


def _content(path: Path, max_file_bytes: int) -> bytes:
    """The file, or nothing where it is too large or cannot be read."""
    try:
        return path.read_bytes() if path.stat().st_size <= max_file_bytes else b""
    except OSError as error:
        log.warning("left out: %s", error)
        return b""


def _text(content: bytes) -> str:
    """UTF-8 with plain newlines and no byte order mark, or nothing."""
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return ""
