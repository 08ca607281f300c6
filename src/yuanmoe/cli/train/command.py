"""`yuanmoe train`: a recipe and a folder of tokens become a model, saved as it goes.

Not here: the steps (`yuanmoe.train`), and what a run shows, writes and survives (`training.py`).
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from yuanmoe.cli.terminal.models import Init, OptionalTokenizer
from yuanmoe.cli.terminal.output import Json, people, print_result
from yuanmoe.errors import ResourceError, UsageError
from yuanmoe.plan import cost
from yuanmoe.plan.cluster.layout import Layout
from yuanmoe.plan.device.machine import read_machine, usable_cores
from yuanmoe.train.parallel.layout import laid_out, layout_of
from yuanmoe.train.recipe.recipe import Recipe
from yuanmoe.train.recipe.recipes import RECIPES, named
from yuanmoe.train.recipe.settings import differences, flat, override
from yuanmoe.train.steps.schedule import spent
from yuanmoe.units import format_count, format_size

if TYPE_CHECKING:
    import torch

    from yuanmoe.checkpoint.open import OpenCheckpoint
    from yuanmoe.cli.train.job import TrainingJob
    from yuanmoe.train.parallel.ranks import Ranks
    from yuanmoe.train.start.data import TrainingData

CHECKPOINTS = "checkpoints"
STATE_BYTES = {"float32": 16, "bfloat16": 18}
"""A parameter's weight, gradient, two moments and, in bfloat16, float32 master and sum of gradients."""
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2}
SUMMED_BYTES = {"float32": 8, "bfloat16": 6}
"""Of these its weight and its sum of gradients, which every rank holds that shares the optimizer's state alone."""


def train(
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
    resolved = _resolve(named(recipe), weights, context, settings or [])
    _print_recipe(console, recipe, resolved)
    if show:
        print_result({"command": "train", "recipe": resolved.to_dict()}, json_only)
        return
    if not data:
        raise UsageError("there is nothing to train on: name a folder of packed tokens with --data")
    texts = _Texts(data=read_places(data), heldout=heldout or [], tokenizer=tokenizer)
    if resolved.lora and weights is None:
        raise UsageError("LoRA adapts a model that is there: name its checkpoint with --init, in 4 bits or whole")
    chosen = layout_of(layout, int(os.environ.get("WORLD_SIZE", "1")), resolved, stages)
    _print_layout(console, chosen)
    place = _Place(out or Path("runs") / recipe, resume=resume, overwrite=overwrite, accept_changes=accept_changes)
    found = _train(place, resolved, chosen, weights, texts, device, threads, console)
    if leads:
        console.print(f"the model: {found['checkpoint']}; the report: {found['report']}", soft_wrap=True, markup=False)
        print_result({"command": "train", "recipe": recipe, "out": str(place.folder)} | found, json_only)
    if found["signal"]:
        console.print(f"stopped by a signal and saved; the same command with --resume goes on: {found['checkpoint']}")
        raise typer.Exit(128 + found["signal"])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Texts:
    """What is read, as it was named."""

    data: list[tuple[float, Path]]
    heldout: list[Path]
    tokenizer: Path | None


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


@dataclass(frozen=True, slots=True)
class _Place:
    """The folder of a run, and how it is entered."""

    folder: Path
    resume: bool
    overwrite: bool
    accept_changes: bool


def _open(init: Path | None) -> "OpenCheckpoint | None":
    if init is None:
        return None
    from yuanmoe.checkpoint.open import open_checkpoint

    return open_checkpoint(init)


def _resolve(recipe: Recipe, weights: "OpenCheckpoint | None", context: int | None, settings: list[str]) -> Recipe:
    """The recipe as it will run: on the sizes of given weights, for longer windows, with single settings last."""
    if weights is not None:
        from yuanmoe.train.start.model import on_weights

        recipe = on_weights(recipe, weights.config)
    if context is not None:
        recipe = recipe.extend_context(context)
    return override(recipe, settings)


def _train(
    place: _Place,
    recipe: Recipe,
    layout: Layout,
    weights: "OpenCheckpoint | None",
    texts: _Texts,
    device: str | None,
    threads: int,
    console: Console,
) -> dict[str, Any]:
    # Torch takes seconds to import; a wrong call has been refused by now.
    import torch

    from yuanmoe.cli.train.job import run_training
    from yuanmoe.train.parallel.ranks import joined, local_device, local_place
    from yuanmoe.train.start.data import open_data
    from yuanmoe.train.state.checkpoint import newest

    place_of_rank = local_device(device)
    torch.set_num_threads(threads or max(1, usable_cores() // local_place()[1]))
    opened = open_data(texts.data, recipe, heldout=texts.heldout, tokenizer=texts.tokenizer)
    with joined(layout, recipe.model, place_of_rank) as ranks:
        checkpoint = _checkpoint(place, recipe, opened.identity, ranks, console)
        _check_memory(recipe, weights, place_of_rank.type, ranks)
        job = _job(place, recipe, weights, opened, checkpoint, place_of_rank, ranks, console)
        found = run_training(job)
    return found | {"checkpoint": str(newest(place.folder / CHECKPOINTS)), "report": str(place.folder / "report.html")}


def _job(
    place: _Place,
    recipe: Recipe,
    weights: "OpenCheckpoint | None",
    opened: "TrainingData",
    checkpoint: Path | None,
    device: "torch.device",
    ranks: "Ranks",
    console: Console,
) -> "TrainingJob":
    """The run, with the model that it begins or goes on with."""
    from yuanmoe.checkpoint.formats.native_config import Origin
    from yuanmoe.cli.train.adapter import print_adapted
    from yuanmoe.cli.train.job import TrainingJob
    from yuanmoe.train.parallel.shard import sharded
    from yuanmoe.train.start.adapt import adapted_model
    from yuanmoe.train.start.model import loaded_model, new_model

    origin, base, computed = Origin(), None, recipe if ranks.layout is None else laid_out(recipe, ranks.layout)
    with console.status("making the model"):
        source = weights if recipe.lora else _open(checkpoint) or weights
        if source is None:
            model = new_model(computed, device)
        elif recipe.lora:
            model, base = adapted_model(computed, source, device, checkpoint)
        else:
            model, origin = loaded_model(computed, source, device), source.origin
    if recipe.lora:
        print_adapted(console, recipe.model, recipe.lora)
    return TrainingJob(
        model=sharded(model, ranks),
        recipe=computed,
        data=opened,
        folder=place.folder,
        console=console,
        origin=origin,
        base=base,
        resumed_from=checkpoint,
        ranks=ranks,
        named=recipe,
    )


def _checkpoint(
    place: _Place, recipe: Recipe, identity: dict[str, Any], ranks: "Ranks", console: Console
) -> Path | None:
    """Where to go on from; None for a new run, whose folder is then free.

    Raises UsageError where a run is in the way, or is to go on with something else than it began with.
    """
    from yuanmoe.train.state.checkpoint import newest, read_facts, steps
    from yuanmoe.train.steps.loop import place_in_text

    checkpoints = place.folder / CHECKPOINTS
    if place.resume:
        found = newest(checkpoints)
        facts = read_facts(found)
        before, now = facts["recipe"] | {"text": facts["data"]}, recipe.to_dict() | {"text": identity}
        changed = differences(flat(before), flat(now))
        _check_changes(place, changed, console)
        if spent(recipe, place_in_text(recipe, facts)[1], facts["elapsed_s"]) >= 1:
            raise UsageError(
                f"the run in {place.folder} has used up its budget after {facts['step']} steps; to go on, raise "
                "schedule.max_tokens or schedule.max_seconds with --set, and add --accept-changes"
            )
        console.print(f"going on from {found}", soft_wrap=True)
        return found
    is_there = checkpoints.is_dir() and bool(steps(checkpoints))
    if is_there and not place.overwrite:
        raise UsageError(
            f"{place.folder} holds a run of {steps(checkpoints)[-1]} steps: --resume goes on with it, --overwrite "
            "starts over, --out names another folder"
        )
    # All have looked before one clears away, and nobody goes on before it has.
    ranks.wait()
    if ranks.leads and is_there:
        shutil.rmtree(place.folder)
    ranks.wait()
    return None


def _check_changes(place: _Place, changed: dict[str, tuple[Any, Any]], console: Console) -> None:
    said = "; ".join(f"{name} was {before}, is {after}" for name, (before, after) in changed.items())
    if changed and not place.accept_changes:
        raise UsageError(
            f"the run in {place.folder} began with other settings: {said}. Repeat its settings, or go on with these: "
            "--accept-changes"
        )
    if changed:
        console.print(f"changed: {said}", soft_wrap=True, markup=False)


def _check_memory(recipe: Recipe, weights: "OpenCheckpoint | None", device: str, ranks: "Ranks") -> None:
    """Raises ResourceError where not even the parameters and what belongs to them fit.

    Every rank begins with the whole model, and then gives up what others hold.
    """
    from yuanmoe.train.parallel.ranks import local_place

    parameters = sum(cost.parameters(recipe.model).values())
    state, weight = STATE_BYTES[recipe.run.dtype], WEIGHT_BYTES[recipe.run.dtype]
    if ranks.sharding == "optimizer":
        state = SUMMED_BYTES[recipe.run.dtype] + (state - SUMMED_BYTES[recipe.run.dtype]) / ranks.num_data
    elif ranks.sharding == "fsdp":
        state = max(weight, 16 / ranks.size)
    if ranks.stages is not None:
        state = max(weight, state * max(ranks.stages.layers) / recipe.model.num_hidden_layers)
    needed = parameters * state * local_place()[1]
    if recipe.lora and weights:
        from yuanmoe.cli.train.adapter import num_adapted

        parameters = num_adapted(recipe.model, recipe.lora)
        frozen = sum(tensor.nbytes for tensor in weights.stored.values())
        needed = (parameters * STATE_BYTES["float32"] + frozen) * local_place()[1]
    free = read_machine().available_bytes
    if device == "cpu" and free is not None and needed > free:
        raise ResourceError(
            f"training {format_count(parameters)} parameters in {recipe.run.dtype} needs {format_size(needed)} for "
            f"weights, gradients and moments, {format_size(free)} of RAM are free; take a smaller recipe or a larger "
            "machine"
        )


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
