"""Where commands write: people read stderr, programs read stdout, whose last line is one JSON object.

At a terminal stdout is read by people too, and the JSON is left out there unless `--json` asks for it.
"""

import json
import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object, also at a terminal.")]
"""Commands that show tables leave them out then."""


def people() -> Console:
    """A console on stderr, for tables and progress."""
    return Console(stderr=True, highlight=False)


def print_table(
    console: Console,
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    left: Collection[int] = (0,),
) -> None:
    """A table under its title: text in the columns of `left`, numbers, on the right, in the others."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index in left else "right")
    for row in rows:
        table.add_row(*row)
    console.print(f"[bold]{title}[/]")
    console.print(table)


def print_result(result: dict[str, Any], asked: bool = False) -> None:
    """The result of a command as one line of JSON, unless people read stdout and nobody `asked` for it.

    Call it last. Numbers must be finite.
    """
    line = json.dumps(result, allow_nan=False)
    if asked or not sys.stdout.isatty():
        # Flushed at once, so that a reader that went away is noticed here and not at exit.
        print(line, flush=True)
