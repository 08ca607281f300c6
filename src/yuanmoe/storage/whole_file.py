"""A file that is whole or not there: written beside, flushed to the disk, and renamed.

What had the name stays until the new file is complete. Not here: whole directories (`folder.py`).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file open for writing that gets the name `path` when the block ends, and is removed when it raises."""
    beside = path.with_name(path.name + ".partial")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        sync_folder(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def write_synced(path: Path, content: str | bytes) -> None:
    """Put a small file on the disk, whole or not at all; text is written as UTF-8."""
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the system can open folders (not Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
