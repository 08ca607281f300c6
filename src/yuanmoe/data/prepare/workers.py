"""The same work on many items in several processes: results in the order of the items, few of them in memory.

A worker is asked through a pipe, round robin, and ends when its pipe does: none outlives this process, however it dies.
Not here: what the work is.
"""

import multiprocessing
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import cycle
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from yuanmoe.errors import ResourceError, YuanError

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 2
"""Items that a worker has at once: one at work, one waiting."""


def map_ordered(
    make: Callable[[], Callable[[Item], Result]], items: Iterable[Item], *, workers: int
) -> Generator[tuple[Item, Result], None, None]:
    """Each item and what the work, made by `make` in every process, gives for it.

    One worker is this process itself. Our own errors are raised here, at their item; ResourceError when a worker dies.
    """
    if workers == 1:
        work = make()
        yield from ((item, work(item)) for item in items)
        return
    with ExitStack() as stack:
        pipes = [stack.enter_context(_Worker(make)) for _ in range(workers)]
        waiting: deque[tuple[Connection, Item]] = deque()
        for pipe, item in zip(cycle(pipes), items, strict=False):
            if len(waiting) == AHEAD * workers:
                yield _answered(*waiting.popleft())
            _ask(pipe, item)
            waiting.append((pipe, item))
        while waiting:
            yield _answered(*waiting.popleft())


class _Worker:
    """The pipe to a new process, which ends with the block."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]]) -> None:
        # Not forked: libraries' threads and locks do not survive that.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make), daemon=True)
        with _without_ctrl_c():
            self._process.start()
        theirs.close()  # so that a dead worker is the end of the pipe

    def __enter__(self) -> Connection:
        return self._pipe

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.terminate()
        self._process.join()


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Processes started here ignore Ctrl-C, also while they start; only the main thread may set signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _ask(pipe: Connection, item: Any) -> None:
    try:
        pipe.send(item)
    except OSError as error:
        raise _died() from error


def _answered(pipe: Connection, item: Item) -> tuple[Item, Any]:
    try:
        done, value = pipe.recv()
    except (EOFError, OSError) as error:
        raise _died() from error
    if done:
        return item, value
    if isinstance(value, YuanError):
        raise value
    raise RuntimeError(f"in a worker process:\n{value}")


def _died() -> ResourceError:
    return ResourceError(
        "a worker process was ended from outside, most likely for want of memory; run the same command again with "
        "fewer --workers to go on"
    )


def _serve(pipe: Connection, make: Callable[[], Callable[[Any], Any]]) -> None:
    """Answers until the pipe is closed. Ctrl-C is left to the process at its other end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    items: queue.SimpleQueue[Any] = queue.SimpleQueue()
    # Items are taken from the pipe at once: were both sides to wait with full pipes, nobody would move.
    threading.Thread(target=_listen, args=(pipe, items), daemon=True).start()
    work = None
    while (item := items.get()) is not None:
        try:
            work = work or make()
            answer = (True, work(item[0]))
        except YuanError as error:
            answer = (False, error)
        except Exception:
            answer = (False, traceback.format_exc())
        try:
            pipe.send(answer)
        except OSError:
            return


def _listen(pipe: Connection, items: "queue.SimpleQueue[Any]") -> None:
    try:
        while True:
            items.put((pipe.recv(),))
    except (EOFError, OSError):
        items.put(None)
