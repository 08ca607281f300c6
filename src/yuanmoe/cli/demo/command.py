"""`yuanmoe demo`: the shipped model completes code; with `--train` another is made from Python's standard library.

The stages of the training are kept in one folder and not done twice. Not here: what they do (`stages.py`), how
completions and their experts look (`showcase.py`).
"""

import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from yuanmoe.cli.demo.done import FinishedStages, Stage
from yuanmoe.cli.demo.stages import Work, works
from yuanmoe.cli.terminal.output import Json, people, print_result
from yuanmoe.errors import UsageError
from yuanmoe.plan import cost
from yuanmoe.shipped import SMALL
from yuanmoe.train.recipe.recipe import Recipe
from yuanmoe.train.recipe.recipes import CODE_PROMPTS, nano
from yuanmoe.units import format_count, parse_size

SAMPLING = {"max_new_tokens": 64, "temperature": 0.5, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 0}


def demo(
    ctx: typer.Context,
    train_one: Annotated[
        bool, typer.Option("--train", help="Then train a model of your own on Python's standard library, in minutes.")
    ] = False,
    seconds: Annotated[float, typer.Option(min=1.0, help="With --train: time to train the model in.")] = 120.0,
    out: Annotated[Path, typer.Option(help="With --train: folder for everything that it makes.")] = Path("demo"),
    corpus_size: Annotated[
        str | None, typer.Option(help="With --train: at most so much of the standard library, such as 2MB.")
    ] = None,
    seed: Annotated[int, typer.Option(help="With --train: of the first weights and the order of the text.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="With --train: do everything again.")] = False,
    json_only: Json = False,
) -> None:
    """Let the small model that comes with yuanmoe complete code, in seconds; with --train, train one of your own.

    What an earlier run finished is reused. Ctrl-C ends the training early and goes on with what was learned.
    """
    if not train_one:
        _refuse_training_options(ctx)
    console = people()
    result: dict[str, Any] = {"command": "demo"}
    if train_one:
        # The completions at the end are its samples.
        recipe = nano().replace("schedule", max_seconds=seconds).replace("run", seed=seed, prompts=())
        max_bytes = None if corpus_size is None else parse_size(corpus_size)
        result["shipped"] = _complete(SMALL, console)
        result |= _train(recipe, out, max_bytes, FinishedStages(out, fresh=fresh), console)
    else:
        result["shipped"] = _complete(SMALL, console)
    _show_next(console, out if train_one else None)
    print_result(result, json_only)


def _refuse_training_options(ctx: typer.Context) -> None:
    for option in ("seconds", "out", "corpus_size", "seed", "fresh"):
        source = ctx.get_parameter_source(option)
        if source is not None and source.name == "COMMANDLINE":
            raise UsageError(f"--{option.replace('_', '-')} is about training a model; add --train")


def _train(
    recipe: Recipe, out: Path, max_bytes: int | None, stages: FinishedStages, console: Console
) -> dict[str, Any]:
    """The stages from the standard library to a model that completes code, and what came of each."""
    console.print("\n[bold]Now another one, from the Python on this machine to code completion[/]\n")
    done = {work.name: _run(stages, work, out, console) for work in works(out, recipe, max_bytes, console)}
    found = {name: stage.summary for name, stage in done.items()}
    reused = [name for name, stage in done.items() if stage.reused]
    return {"out": str(out), "reused": reused} | found | {"completions": _complete(out / "model", console)}


def _complete(model: str | Path, console: Console) -> list[dict[str, Any]]:
    """What a model makes of the prompts, shown with its experts; and the same for programs."""
    with console.status("completing code"):
        from yuanmoe.cli.generate.showcase import completions_json, show_completions
        from yuanmoe.lm import load

        start = time.monotonic()
        lm = load(model, device="cpu")
        completions = lm.generate_batch(CODE_PROMPTS, routing=True, **SAMPLING)
        seconds = time.monotonic() - start
    total = format_count(sum(cost.parameters(lm.config).values()))
    console.print(f"[bold]{model}[/]: {total} parameters, loaded and asked in {seconds:.1f} s", soft_wrap=True)
    show_completions(console, lm, CODE_PROMPTS, completions)
    return completions_json(lm, CODE_PROMPTS, completions)


def _run(stages: FinishedStages, work: Work, out: Path, console: Console) -> Stage:
    """One stage, and a line about it when it is done."""
    start = time.monotonic()
    with console.status(work.doing) if work.doing else nullcontext():
        stage = stages.run(work.name, work.settings, [out / output for output in work.outputs], work.do)
    taken = "kept" if stage.reused else f"{time.monotonic() - start:.1f} s"
    console.print(f"  {work.name:<9}  {work.line(stage.summary)} [dim]({taken})[/]", soft_wrap=True)
    return stage


def _show_next(console: Console, trained: Path | None) -> None:
    """Commands that work from here: with the model that was trained, or with the shipped one."""
    program, model, page = _program(), SMALL, "experts.html"
    if trained is not None:
        model, page = str(trained / "model"), str(trained / "experts.html")
    console.print("\n[bold]Next[/]")
    for arguments in (
        f'generate --model {model} "def main():" --temperature 0.5 --show-experts',
        f"inspect --model {model} --text {os.__file__} --html {page}",
        "plan M32 --bits 4 --ram 24GiB" if trained is not None else "demo --train",
    ):
        console.print(f"  {program} {arguments}", soft_wrap=True, markup=False)


def _program() -> str:
    """This program as it can be called from here."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{Path(sys.executable).name} -m yuanmoe"
    beside = os.path.relpath(called)
    return beside if len(beside) < len(str(called)) else str(called)
