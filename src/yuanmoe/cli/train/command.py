"""`yuanmoe train`: a recipe and a folder of tokens become a model, saved as it goes.

Not here: the run (`yuanmoe.train.run`), and how it is shown (`job.py`).
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from yuanmoe.cli.terminal.models import Init, OptionalTokenizer
from yuanmoe.cli.terminal.output import Json, people, print_result
from yuanmoe.errors import UsageError
from yuanmoe.plan import cost
from yuanmoe.plan.cluster.layout import Layout
from yuanmoe.plan.device.machine import usable_cores
from yuanmoe.train.parallel.layout import layout_of
from yuanmoe.train.recipe.recipe import Recipe
from yuanmoe.train.recipe.recipes import RECIPES, named
from yuanmoe.train.recipe.resolve import check_has_base, resolve
from yuanmoe.train.recipe.settings import flat
from yuanmoe.units import format_count

if TYPE_CHECKING:
    from yuanmoe.checkpoint.open import OpenCheckpoint
    from yuanmoe.train.run import TrainOptions


def train_recipe(
    recipe: Annotated[str, typer.Argument(help=f"One of {', '.join(RECIPES)}.")],
    data: Annotated[
        list[str] | None,
        typer.Option(help="Dataset, Megatron pair, or folder of train and heldout; repeat it, WEIGHT=PATH to mix."),
    ] = None,
    heldout: Annotated[
        list[Path] | None, typer.Option(help="Dataset to measure on, beside those that --data has.")
    ] = None,
    tokenizer: OptionalTokenizer = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/RECIPE by default.")] = None,
    init: Init = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting: optimizer.learning_rate=3e-4.")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Longer windows, with the RoPE base for them.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of the run.")] = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on although the recipe or the data changed.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that is in the folder.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the resolved recipe and stop.")] = False,
    layout: Annotated[
        str, typer.Option(help="Under torchrun who does what, as `plan --cluster` says it: 'dp4 ep2 fsdp mb1 full'.")
    ] = "",
    stages: Annotated[
        str | None, typer.Option(help="Layers of each stage of a pipeline, such as 2,3,3; balanced by default.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU where there is one.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 takes all cores.")] = 0,
    json_only: Json = False,
) -> None:
    """Train RECIPE on DATA. Ctrl-C and SIGTERM save first; --resume goes on as if nothing had happened."""
    leads = os.environ.get("RANK", "0") == "0"
    console = people() if leads else Console(quiet=True)
    weights = _open(init)
    config = None if weights is None else weights.config
    resolved = resolve(named(recipe), config, context=context, settings=settings or [])
    _print_recipe(console, recipe, resolved)
    if show:
        print_result({"command": "train", "recipe": resolved.to_dict()}, json_only)
        return
    if not data:
        raise UsageError("there is nothing to train on: name a folder of packed tokens with --data")
    places = read_places(data)
    check_has_base(resolved, config)
    _print_layout(console, layout_of(layout, int(os.environ.get("WORLD_SIZE", "1")), resolved, stages))
    folder = out or Path("runs") / recipe
    options: TrainOptions = {
        "settings": settings or [],
        "heldout": heldout or [],
        "tokenizer": tokenizer,
        "context": context,
        "accept_changes": accept_changes,
        "overwrite": overwrite,
        "layout": layout,
        "stages": stages,
        "device": device,
    }
    found = _train(console, threads, recipe, data=places, out=folder, init=init, resume=resume, **options)
    if leads:
        console.print(f"the model: {found['checkpoint']}; the report: {found['report']}", soft_wrap=True, markup=False)
        print_result({"command": "train", "recipe": recipe, "out": str(folder)} | found, json_only)
    if found["signal"]:
        console.print(f"stopped by a signal and saved; the same command with --resume goes on: {found['checkpoint']}")
        raise typer.Exit(128 + found["signal"])


train = train_recipe
"""The name in the table of commands; in the package `train` is the library's."""


def read_places(words: list[str]) -> list[tuple[float, Path]]:
    """Weights and paths from `PATH` or `WEIGHT=PATH` each. Raises UsageError unless all or none have a weight."""
    pairs = [word.partition("=") for word in words]
    weighted = [bool(equals) and not Path(word).exists() for word, (_, equals, _) in zip(words, pairs, strict=True)]
    if any(weighted) and not all(weighted):
        raise UsageError(
            f"{words[weighted.index(False)]} has no weight, others have; write --data WEIGHT=PATH for each"
        )
    if not any(weighted):
        return [(1.0, Path(word)) for word in words]
    return [(_weight(weight, path), Path(path)) for weight, _, path in pairs]


def _weight(text: str, path: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{text!r} is no weight for {path}; write --data WEIGHT=PATH, such as 25.2={path}") from None


def _open(init: Path | None) -> "OpenCheckpoint | None":
    if init is None:
        return None
    from yuanmoe.checkpoint.open import open_checkpoint

    return open_checkpoint(init)


def _train(console: Console, threads: int, recipe: str, **options: Any) -> dict[str, Any]:
    # Torch takes seconds to import; a wrong call has been refused by now.
    import torch

    from yuanmoe.cli.train.job import TerminalObserver
    from yuanmoe.train.parallel.ranks import local_place
    from yuanmoe.train.run import train as train_run

    torch.set_num_threads(threads or max(1, usable_cores() // local_place()[1]))
    with TerminalObserver(console) as observer:
        return train_run(recipe, observer=observer, **options) | {"peak_flops_per_s": observer.peak_flops}


def _print_layout(console: Console, layout: Layout) -> None:
    """Who does what, where there are several."""
    if layout.data * layout.stages > 1:
        layers = f", stages of {','.join(map(str, layout.layers))} layers" if layout.layers else ""
        console.print(f"layout {' '.join(layout.words)}{layers}", markup=False, soft_wrap=True)


def _print_recipe(console: Console, name: str, recipe: Recipe) -> None:
    """Every setting, those that differ from the recipe of that name in bold."""
    before = flat(named(name).to_dict())
    total = sum(cost.parameters(recipe.model).values())
    active = sum(cost.active_parameters(recipe.model).values())
    console.print(f"[bold]{name}[/]: {format_count(total)} parameters, {format_count(active)} for a token")
    for key, value in flat(recipe.to_dict()).items():
        text = f"  {key} = {value!r}" if isinstance(value, str | list) else f"  {key} = {value}"
        style = "bold" if value != before[key] else "dim"
        console.print(text, style=style, markup=False, soft_wrap=True)
    console.print()
