"""The `yuanmoe` program: a table of commands, each imported only when it is called, and what happens to errors.

Every command is a function of the same name in its file of this folder, annotated for typer, or a family of such;
`--help` imports none of them (torch takes seconds). Exit codes: 0 done, 1 an error of ours, 2 a wrong call,
130 Ctrl-C, 141 the reader left.
"""

import os
import sys
import time
import warnings
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from yuanmoe.cli.examples import EXAMPLES
from yuanmoe.errors import UsageError, YuanError

COMMANDS = {
    "plan": ("plan.command", "Will it fit, how fast, at what cost."),
    "doctor": ("doctor.command", "What this machine has, what is missing, what to do."),
    "convert": ("convert", "Turn a checkpoint into the native format, or back."),
    "verify": ("convert", "Check a checkpoint: every file, tensor and shape."),
    "quantize": ("quantize.command", "Write a model in 4 or 8 bits, and what that costs."),
    "generate": ("generate.command", "Complete a text."),
    "chat": ("generate.command", "Talk with a model."),
    "serve": ("serve", "An OpenAI endpoint and a page, for many at once."),
    "api-key": ("serve", "Make a key for the server."),
    "inspect": ("inspect.command", "Look into a model: what it does with a text."),
    "data": ("data.command", "Turn text into tokens to train on, and look into them."),
    "bench": ("bench.command", "Measure speed side by side with transformers."),
    "train": ("train.command", "Train a model: from random weights or from a checkpoint."),
    "adapter": ("train.adapter", "Look at what LoRA learned, merge it into weights, export it."),
    "demo": ("demo.command", "Let the small model complete code; train one of your own."),
}
"""Command: module of this folder, line of help."""

LEADING_S = 2.0
"""What other ranks leave the leading one to say an error first."""


class LazyGroup(TyperGroup):
    """A group whose commands are stand-ins with a line of help until one of them is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        assert name is not None, "resolving a command either names one or raises"
        return name, load_command(name), rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except YuanError as error:
            _fail(error)
        except KeyboardInterrupt:
            sys.exit(130)
        except BrokenPipeError:
            # Python flushes stdout once more at exit; without a place to go that would print a second error.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)


def load_command(name: str) -> Any:
    """The command behind a name of the table, with its file imported."""
    module, help_line = COMMANDS[name]
    command = getattr(import_module(f"yuanmoe.cli.{module}"), name.replace("-", "_"))
    if isinstance(command, typer.Typer):  # a family with commands of its own
        return _with_examples(name, typer.main.get_command(command))
    # Plain help: rich's takes a third of the time in which the answer should be there.
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name, short_help=help_line)(command)
    return _with_examples(name, typer.main.get_command(single))


def _with_examples(name: str, command: Any) -> Any:
    """The command with an example at the end of its help, and of that of each command inside."""
    command.epilog = _example(name)
    for inner, each in getattr(command, "commands", {}).items():
        each.epilog = _example(f"{name} {inner}")
    return command


def _example(name: str) -> str:
    # After this mark lines stay as they are.
    return f"\b\nExample:\n  {EXAMPLES[name]}"


def _fail(error: YuanError) -> NoReturn:
    if os.environ.get("YUANMOE_TRACEBACK") == "1":
        raise error
    if os.environ.get("RANK", "0") != "0":
        # Most errors are those of all ranks: where the leading one has said it, torchrun ends this one meanwhile.
        time.sleep(LEADING_S)
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2 if isinstance(error, UsageError) else 1)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """In a line, for people, without the line of code that it came from."""
    print(f"warning: {message}", file=sys.stderr)


def _print_version(wanted: bool) -> None:
    if wanted:
        from yuanmoe import __version__

        print(f"yuanmoe {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=LazyGroup,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Yuan 2.0-M32 and its family on your machine.",
    epilog=_example(""),
)


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print it.")
    ] = False,
) -> None:
    """Options of the program itself."""


def _stand_in() -> None:
    raise AssertionError("LazyGroup puts the command itself in this one's place before it runs")


for _name, (_, _help_line) in COMMANDS.items():
    app.command(_name, help=_help_line)(_stand_in)


def main() -> None:
    """Entry point of the `yuanmoe` script."""
    # By default threads of torch's OpenMP spin while they wait for one another, and stop each other where another
    # program takes a core: a training step then took 20 times as long. A short spin costs 10 % on quiet cores, none at
    # all 60 % (docs/log.md). Read when torch loads, so set before.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    warnings.showwarning = _show_warning
    app(prog_name="yuanmoe")
