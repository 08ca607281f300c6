"""A directory that appears whole or not at all: written as `NAME.partial/checkpoint`, flushed, and renamed.

Whatever had the name before stays untouched until the new one is complete, and is exchanged for it in one step where
the system can (Linux). `NAME.partial` is known to be ours by a file beside `checkpoint`, which may be what was replaced
when a process is killed at the very end. Packed tokens are written in the same way, see `Kind`.
Not here: what is in the directory (`writer.py`).
"""

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: what only reads works, `new_folder` refuses
    fcntl = None

from yuanmoe.errors import CheckpointError, ResourceError, UsageError, YuanError
from yuanmoe.storage.whole_file import sync_folder, write_synced
from yuanmoe.units import format_size

_MARKER = "unfinished.txt"

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says of a disk without room."""
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What such a directory is."""

    noun: str
    """In messages, and the name of the content in `NAME.partial`."""
    proof: str
    """A file that every directory of this kind has; one without it is not overwritten."""
    error: type[YuanError]
    """What a user may have to be told is of this class."""


CHECKPOINT = Kind(noun="checkpoint", proof="config.json", error=CheckpointError)


@contextmanager
def new_folder(dst: Path, *, overwrite: bool, kind: Kind = CHECKPOINT) -> Iterator[Path]:
    """A folder to write into, which becomes `dst` when the block ends, and is kept for the next run when it raises.

    Raises the error of `kind` when there is something at `dst` and not `overwrite`, when that is of another kind, when
    another process is writing it, when `NAME.partial` is not ours, or where files cannot be locked (Windows);
    ResourceError when the disk is full.
    """
    if fcntl is None:
        raise kind.error(f"writing {dst} needs a file lock, which Python lacks here (Windows); use Linux, macOS or WSL")
    _check_destination(dst, overwrite, kind)
    partial = dst.with_name(dst.name + ".partial")
    with disk_errors(partial, kind):
        partial.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            _claim(descriptor, partial, kind)
            content = partial / kind.noun
            content.mkdir(exist_ok=True)
            yield content
            _publish(content, dst)
        finally:
            os.close(descriptor)


def remove_leftovers(dst: Path) -> None:
    """Remove what is left of `NAME.partial` where a process was killed after it had renamed the content to `dst`."""
    partial = dst.with_name(dst.name + ".partial")
    if partial.is_dir() and all(path.name.startswith(_MARKER) for path in partial.iterdir()):
        shutil.rmtree(partial)


def check_apart(src: Path | str, dst: Path | str) -> None:
    """Raises UsageError where writing `dst` would replace what is read from `src`."""
    source, target = Path(src).resolve(), Path(dst).resolve()
    if source == target or target in source.parents:
        raise UsageError(f"the source {src} is or lies in the destination {dst}; name another destination")


def check_free_disk(folder: Path, needed: int) -> None:
    """Raises ResourceError where `needed` bytes are not free on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(
            f"{folder} still needs {format_size(needed)}, {format_size(free)} are free on its disk; "
            "make room or choose another disk, then run the same command again"
        )


def copy_synced(source: Path, folder: Path) -> None:
    """Put a copy of a file into `folder` and on the disk."""
    with source.open("rb") as original, (folder / source.name).open("wb") as copy:
        shutil.copyfileobj(original, copy)
        copy.flush()
        os.fsync(copy.fileno())


def _check_destination(dst: Path, overwrite: bool, kind: Kind) -> None:
    if not dst.exists():
        return
    if not dst.is_dir():
        raise kind.error(f"{dst} is a file; name a directory")
    if not any(dst.iterdir()):
        return
    if not overwrite:
        raise kind.error(f"{dst} exists and is left as it is; choose another name, or overwrite=True (--overwrite)")
    if not (dst / kind.proof).is_file():
        raise kind.error(
            f"{dst} is not a {kind.noun} (it has no {kind.proof}), so it is not overwritten; remove it yourself"
        )


def _claim(descriptor: int, partial: Path, kind: Kind) -> None:
    assert fcntl is not None, "new_folder refuses without it"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise kind.error(f"another process is writing {partial}; wait for it, or choose another name") from error
    if not (partial / _MARKER).exists():
        if any(not path.name.startswith(_MARKER) for path in partial.iterdir()):
            raise kind.error(f"{partial} is in the way: it is not an unfinished {kind.noun}; move it")
        write_synced(partial / _MARKER, "yuanmoe goes on here when the same command runs again; safe to remove\n")


def _publish(content: Path, dst: Path) -> None:
    """Give the finished content the name `dst`, and remove what had it."""
    partial = content.parent
    sync_folder(content)
    if not dst.exists():
        content.rename(dst)
    elif not _exchange(content, dst):
        # Killed between these two, `dst` is missing until the next run; what was there is kept until then.
        dst.rename(partial / "replaced")
        content.rename(dst)
    sync_folder(dst.parent)
    for folder in filter(Path.is_dir, list(partial.iterdir())):
        shutil.rmtree(folder)
    shutil.rmtree(partial)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; whether the system could."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0


@contextmanager
def disk_errors(partial: Path, kind: Kind = CHECKPOINT) -> Iterator[None]:
    """What the system says of writing `partial` as the error of `kind`, or ResourceError when the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise kind.error(f"writing {partial} failed: {error}") from error
        raise ResourceError(
            f"the disk is full: {error.strerror} in {partial}. What is finished is kept there; "
            "make room and run the same command again to go on"
        ) from error
