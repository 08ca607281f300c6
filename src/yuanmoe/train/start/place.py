"""The folder that a run begins in or goes on in, and what is refused before a model is made.

Not here: the claim of the folder by one process (`storage/run_folder.py`).
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yuanmoe.checkpoint.adapters.adapter import adaptable_matrices
from yuanmoe.checkpoint.open import OpenCheckpoint
from yuanmoe.errors import ResourceError, UsageError
from yuanmoe.model.lora.targets import num_parameters, targets
from yuanmoe.plan import cost
from yuanmoe.plan.device.machine import read_machine
from yuanmoe.storage.run_folder import LOCK
from yuanmoe.train.parallel.ranks import Ranks, local_place
from yuanmoe.train.recipe.recipe import Recipe
from yuanmoe.train.recipe.settings import differences, flat
from yuanmoe.train.state.checkpoint import newest_whole, read_facts, steps
from yuanmoe.train.steps.loop import place_in_text
from yuanmoe.train.steps.schedule import spent
from yuanmoe.units import format_count, format_size

CHECKPOINTS = "checkpoints"
STATE_BYTES = {"float32": 16, "bfloat16": 18}
"""A parameter's weight, gradient, two moments and, in bfloat16, float32 master and sum of gradients."""
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2}
SUMMED_BYTES = {"float32": 8, "bfloat16": 6}
"""Of these its weight and its sum of gradients, which every rank holds that shares the optimizer's state alone."""
_FIXED = ("lora.rank", "lora.targets", "lora.router")
"""Settings that the shapes of LoRA weights follow from: a run cannot go on with others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlace:
    """The folder of a run, and how it is entered."""

    folder: Path
    resume: bool = False
    overwrite: bool = False
    accept_changes: bool = False


def checkpoint_to_resume(
    place: RunPlace, recipe: Recipe, identity: dict[str, Any], ranks: Ranks, say: Callable[[str], None]
) -> Path | None:
    """Where to go on from; None for a new run, whose folder is then free.

    Raises UsageError where a run is in the way, or is to go on with something else than it began with, and
    CheckpointError where its newest checkpoint is damaged.
    """
    checkpoints = place.folder / CHECKPOINTS
    if place.resume:
        found = newest_whole(checkpoints)
        facts = read_facts(found)
        before, now = facts["recipe"] | {"text": facts["data"]}, recipe.to_dict() | {"text": identity}
        _check_changes(place, differences(flat(before), flat(now)), say)
        if spent(recipe, place_in_text(recipe, facts)[1], facts["elapsed_s"]) >= 1:
            raise UsageError(
                f"the run in {place.folder} has used up its budget after {facts['step']} steps; to go on, raise "
                "schedule.max_tokens or schedule.max_seconds with --set, and add --accept-changes"
            )
        say(f"going on from {found}")
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
        _clear(place.folder)
    ranks.wait()
    return None


def _clear(folder: Path) -> None:
    """Removes all but the lock, which this process holds."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _check_changes(place: RunPlace, changed: dict[str, tuple[Any, Any]], say: Callable[[str], None]) -> None:
    said = "; ".join(f"{name} was {before}, is {after}" for name, (before, after) in changed.items())
    fixed = [name for name in _FIXED if name in changed]
    if fixed:
        raise UsageError(
            f"the run in {place.folder} began with other LoRA weights: {said}. {', '.join(fixed)} cannot change in a "
            "run: repeat its settings, or start another run with --out"
        )
    if changed and not place.accept_changes:
        raise UsageError(
            f"the run in {place.folder} began with other settings: {said}. Repeat its settings, or go on with these: "
            "--accept-changes"
        )
    if changed:
        say(f"changed: {said}")


def check_same_on_all_ranks(recipe: Recipe, identity: dict[str, Any], ranks: Ranks) -> None:
    """Raises UsageError, on all ranks, where one of them was started with other settings or other data."""
    everywhere = ranks.all(flat(recipe.to_dict() | {"text": identity}))
    for rank, there in enumerate(everywhere):
        if changed := differences(everywhere[0], there):
            said = "; ".join(f"{name} is {ours} on rank 0, {theirs}" for name, (ours, theirs) in changed.items())
            raise UsageError(f"the ranks were started differently: {said} on rank {rank}; start all with one command")


def check_memory(recipe: Recipe, weights: OpenCheckpoint | None, device: str, ranks: Ranks) -> None:
    """Raises ResourceError where not even the parameters and what belongs to them fit.

    Every rank begins with the whole model, and then gives up what others hold.
    """
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
        shapes = targets(adaptable_matrices(recipe.model), recipe.lora)
        parameters = sum(num_parameters(shape, recipe.lora.rank) for shape in shapes.values())
        frozen = sum(tensor.nbytes for tensor in weights.stored.values())
        needed = (parameters * STATE_BYTES["float32"] + frozen) * local_place()[1]
    free = read_machine().available_bytes
    if device == "cpu" and free is not None and needed > free:
        raise ResourceError(
            f"training {format_count(parameters)} parameters in {recipe.run.dtype} needs {format_size(needed)} for "
            f"weights, gradients and moments, {format_size(free)} of RAM are free; take a smaller recipe or a larger "
            "machine"
        )
