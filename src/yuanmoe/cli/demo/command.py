"""`yuanmoe demo`: the shipped model completes code, then another is made from the Python standard library, here.

Its stages are kept in one folder and not done twice. Not here: what they do (`demo_stages.py`), how completions and
their experts look (`showcase.py`).
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
from yuanmoe.cli.terminal.output import people, print_result
from yuanmoe.plan import cost
from yuanmoe.shipped import SMALL
from yuanmoe.train.recipe.recipes import CODE_PROMPTS, nano
from yuanmoe.units import format_count, parse_size

SAMPLING = {"max_new_tokens": 64, "temperature": 0.5, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 0}


def demo(
    seconds: Annotated[float, typer.Option(min=1.0, help="Time to train the model in.")] = 120.0,
    out: Annotated[Path, typer.Option(help="Folder for everything that it makes.")] = Path("demo"),
    corpus_size: Annotated[
        str | None, typer.Option(help="At most so much of the standard library, such as 2MB.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the model's start and the order of its text.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do everything again.")] = False,
) -> None:
    """Let the small model complete code; then train a smaller one on Python's standard library, here and now.

    What an earlier run finished is reused. Ctrl-C ends the training early and goes on with what was learned.
    """
    # The completions at the end are its samples.
    recipe = nano().replace("schedule", max_seconds=seconds).replace("run", seed=seed, prompts=())
    max_bytes = None if corpus_size is None else parse_size(corpus_size)
    console = people()
    shipped = _complete(SMALL, console)
    console.print("\n[bold]Now another one, from the Python on this machine to code completion[/]\n")
    stages = FinishedStages(out, fresh=fresh)
    done = {work.name: _run(stages, work, out, console) for work in works(out, recipe, max_bytes, console)}
    completions = _complete(out / "model", console)
    _say_next(console, out)
    result = {"command": "demo", "out": str(out), "reused": [name for name, stage in done.items() if stage.reused]}
    found = {name: stage.summary for name, stage in done.items()}
    print_result(result | found | {"shipped": shipped, "completions": completions})


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


def _say_next(console: Console, out: Path) -> None:
    """Commands that work from here."""
    program, model = _program(), out / "model"
    console.print("\n[bold]Next[/]")
    for arguments in (
        'generate "def main():" --show-experts',
        f'generate --model {model} "def main():" --temperature 0.5 --show-experts',
        f"inspect --model {model} --text {os.__file__} --html {out / 'experts.html'}",
        "plan M32 --bits 4 --ram 24GiB",
    ):
        console.print(f"  {program} {arguments}", soft_wrap=True, markup=False)


def _program() -> str:
    """This program as it can be called from here."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{Path(sys.executable).name} -m yuanmoe"
    beside = os.path.relpath(called)
    return beside if len(beside) < len(str(called)) else str(called)
