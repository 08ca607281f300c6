"""A directory that appears whole or not at all: written beside as `NAME.partial`, flushed, and renamed.

Whatever had the name before stays untouched until the new one is complete, and is exchanged for it in one step where
the system can (Linux). Not here: what is in the directory (`writer.py`).
"""

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from yuanmoe.errors import CheckpointError, ResourceError
from yuanmoe.plan.sizes import format_size

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def partial_of(dst: Path) -> Path:
    """Where `dst` is while it is being written."""
    return dst.with_name(dst.name + ".partial")


@contextmanager
def new_folder(dst: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to write into, which becomes `dst` when the block ends, and is kept for the next run when it raises.

    Raises CheckpointError when there is something at `dst` and not `overwrite`, when that is no checkpoint, or when
    another process is writing it; ResourceError when the disk is full.
    """
    _check_destination(dst, overwrite)
    partial = partial_of(dst)
    with _disk_errors(partial):
        partial.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            _claim(descriptor, partial)
            yield partial
            os.fsync(descriptor)
            _publish(partial, dst)
        finally:
            os.close(descriptor)


def check_free_disk(folder: Path, needed: int) -> None:
    """Raises ResourceError where `needed` bytes are not free on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(
            f"{folder} still needs {format_size(needed)}, {format_size(free)} are free on its disk; "
            "make room or choose another disk, then run the same command again"
        )


def write_synced(path: Path, text: str) -> None:
    """Put a small file on the disk, whole or not at all."""
    beside = path.with_name(path.name + ".new")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    _sync(path.parent)


def copy_synced(source: Path, folder: Path) -> None:
    """Put a copy of a file into `folder` and on the disk."""
    with source.open("rb") as original, (folder / source.name).open("wb") as copy:
        shutil.copyfileobj(original, copy)
        copy.flush()
        os.fsync(copy.fileno())


def _check_destination(dst: Path, overwrite: bool) -> None:
    if not dst.exists():
        return
    if not dst.is_dir():
        raise CheckpointError(f"{dst} is a file; name a directory")
    if not any(dst.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(
            f"{dst} exists and is left as it is; choose another name, or overwrite=True (--overwrite)"
        )
    if not (dst / "config.json").is_file():
        raise CheckpointError(
            f"{dst} is not a checkpoint (it has no config.json), so it is not overwritten; remove it yourself"
        )


def _claim(descriptor: int, partial: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CheckpointError(f"another process is writing {partial}; wait for it, or choose another name") from error


def _publish(partial: Path, dst: Path) -> None:
    if not dst.exists():
        partial.rename(dst)
    elif _exchange(partial, dst):
        shutil.rmtree(partial)
    else:
        replaced = dst.with_name(dst.name + ".replaced")
        dst.rename(replaced)
        partial.rename(dst)
        shutil.rmtree(replaced)
    _sync(dst.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; whether the system could."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _disk_errors(partial: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise CheckpointError(f"writing {partial} failed: {error}") from error
        raise ResourceError(
            f"the disk is full: {error.strerror} in {partial}. What is finished is kept there; "
            "make room and run the same command again to go on"
        ) from error
