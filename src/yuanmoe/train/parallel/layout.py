"""The layout of a run: words as `plan --cluster` prints them, completed for so many ranks and checked against a recipe.

It says how a run computes, never what: a run that was saved under one layout goes on under another. No torch, so that a
wrong call is refused at once.
"""

import re
from dataclasses import replace
from typing import Any

from yuanmoe.errors import UsageError
from yuanmoe.plan.cluster.layout import SHARDING, Layout, balanced_stages, check_expert_ranks, check_stages, read_stages
from yuanmoe.train.recipe.recipe import Recipe

_NUMBERS = {"dp": "data", "pp": "stages", "ep": "experts", "mb": "micro_batch"}
_CHECKPOINTING = ("none", "full")
"""What training knows; `selective` is the planner's alone."""


def layout_of(text: str, ranks: int, recipe: Recipe, layers: str | None = None) -> Layout:
    """The layout that these words ask of so many ranks; what they leave out has its default.

    That is all ranks as data ranks, each holding its share of the optimizer's state, and the recipe's own micro-batches
    and checkpointing. `layers` of each stage of a pipeline are a list such as 2,3,3, by default a balanced one. Raises
    UsageError where ranks, batches, layers or experts cannot be divided so.
    """
    said = _read(text)
    chosen = () if layers is None else read_stages(layers)
    stages = said.get("stages", max(1, len(chosen)))
    if chosen and len(chosen) != stages:
        raise UsageError(f"stages {layers} are {len(chosen)}, the layout says pp{stages}; leave one of them out")
    data = said.get("data", max(1, ranks // stages))
    if data * stages != ranks:
        raise UsageError(
            f"a layout of {data} data ranks and {stages} stages needs {data * stages} processes, there are {ranks}; "
            f"start them with: torchrun --nproc-per-node {data * stages} -m yuanmoe train ..."
        )
    layout = Layout(
        data=data,
        stages=stages,
        experts=said.get("experts", 1),
        sharding=said.get("sharding", "optimizer" if data > 1 else "replicated"),
        micro_batch=said.get("micro_batch") or recipe.data.micro_batch_size or _at_once(recipe, data, stages),
        checkpointing=said.get("checkpointing", "full" if recipe.run.activation_checkpointing else "none"),
        layers=chosen or (balanced_stages(recipe.model, stages) if stages > 1 else ()),
    )
    _check(layout, recipe)
    return layout


def _at_once(recipe: Recipe, data: int, stages: int) -> int:
    """Windows at a time: a rank's share of the batch, or so many that no stage of a pipeline has none to work on."""
    share = max(1, recipe.data.batch_size // data)
    most = max(1, share // stages)
    return max(size for size in range(1, most + 1) if share % size == 0)


def laid_out(recipe: Recipe, layout: Layout) -> Recipe:
    """The recipe as every rank computes it; what names the run stays the recipe itself."""
    data = replace(recipe.data, micro_batch_size=layout.micro_batch)
    run = replace(recipe.run, activation_checkpointing=layout.checkpointing == "full")
    return replace(recipe, data=data, run=run)


def _read(text: str) -> dict[str, Any]:
    said: dict[str, Any] = {}
    for word in text.split():
        name, value = _word(word)
        if name in said:
            raise UsageError(f"the layout {text!r} says {name.replace('_', ' ')} twice")
        said[name] = value
    return said


def _word(word: str) -> tuple[str, Any]:
    number = re.fullmatch(r"(dp|pp|ep|mb)([1-9]\d*)", word)
    if number:
        return _NUMBERS[number[1]], int(number[2])
    if word in SHARDING:
        return "sharding", word
    if word in _CHECKPOINTING:
        return "checkpointing", word
    raise UsageError(
        f"{word!r} is no word of a layout; there are dp2 (data ranks), pp2 (stages of a pipeline), ep2 (data ranks "
        f"that hold all experts together), {', '.join(SHARDING)} (what data ranks share), mb2 (windows at a time), "
        f"{' and '.join(_CHECKPOINTING)} (what a layer computes again)"
    )


def _check(layout: Layout, recipe: Recipe) -> None:
    if layout.layers:
        check_stages(layout.layers, recipe.model, layout.data * layout.stages)
    if layout.stages > 1 and layout.sharding == "fsdp":
        raise UsageError(
            f"pp{layout.stages} and fsdp are not trained together: FSDP2 would gather the weights of a stage for every "
            "micro-batch; take optimizer or replicated, which share inside each stage"
        )
    batch = recipe.data.batch_size
    if batch % (layout.data * layout.micro_batch):
        raise UsageError(
            f"a batch of {batch} windows is no multiple of {layout.data} data ranks times {layout.micro_batch} windows "
            "at a time; change data.batch_size, data.micro_batch_size (or mb in the layout), or the number of ranks"
        )
    if layout.data % layout.experts:
        raise UsageError(f"{layout.data} data ranks are no multiple of {layout.experts} expert ranks")
    check_expert_ranks(layout.experts, recipe.model)
    if recipe.lora and (layout.experts > 1 or layout.stages > 1 or layout.sharding == "fsdp"):
        raise UsageError("LoRA leaves its base whole on every rank: take a layout of data ranks alone, without fsdp")
