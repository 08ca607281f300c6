"""How far a long piece of work is, on stderr: a bar on a terminal, now and then a line where output goes to a file."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from yuanmoe.cli.terminal.output import people
from yuanmoe.units import format_size

LINE_EVERY_S = 30.0
"""Off a terminal; the first after as long, so that short work leaves no line."""


@contextmanager
def bytes_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """For a function that tells bytes done and in all: speed and time left."""
    console = people()
    if not console.is_terminal:
        yield _lines(console, title)
        return
    name = TextColumn("{task.description}", markup=False)  # a path may hold braces and brackets
    columns = (name, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def tokens_progress(what: str, tokens: int) -> Iterator[Callable[[float], None]]:
    """For a function that tells how many tokens were done since it last did."""
    columns = (TextColumn(what), BarColumn(), TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens"))
    console = people()
    # Off a terminal a bar that is to vanish would leave an empty line.
    hidden = not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(what, total=tokens)
        yield lambda done: bar.advance(task, done)


def _lines(console: Console, title: str) -> Callable[[int, int], None]:
    start = said = time.monotonic()
    first: int | None = None

    def hear(done: int, total: int) -> None:
        nonlocal said, first
        first = done if first is None else first  # An earlier run may have done some of it.
        now = time.monotonic()
        if now - said < LINE_EVERY_S or done >= total:
            return
        said = now
        speed = (done - first) / (now - start)
        left = f", {(total - done) / speed / 60:,.0f} minutes left" if speed else ""
        console.print(f"{title}: {format_size(done)} of {format_size(total)}{left}", soft_wrap=True, markup=False)

    return hear
