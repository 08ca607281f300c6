"""The layout of a run: words as `plan --cluster` prints them, completed for so many ranks and checked against a recipe.

It says how a run computes, never what: a run that was saved under one layout goes on under another. No torch, so that a
wrong call is refused at once.
"""

import re
from dataclasses import replace
from typing import Any

from yuanmoe.errors import UsageError
from yuanmoe.plan.layout import SHARDING, Layout, check_expert_ranks
from yuanmoe.train.recipe import Recipe

_NUMBERS = {"dp": "data", "pp": "stages", "ep": "experts", "mb": "micro_batch"}
_CHECKPOINTING = ("none", "full")
"""What training knows; `selective` is the planner's alone."""


def layout_of(text: str, ranks: int, recipe: Recipe) -> Layout:
    """The layout that these words ask of so many ranks; what they leave out has its default.

    That is all ranks as data ranks, each holding its share of the optimizer's state, and the recipe's own micro-batches
    and checkpointing. Raises UsageError where ranks, batches or experts cannot be divided so.
    """
    said = _read(text)
    stages = said.get("stages", 1)
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
        sharding=said.get("sharding", "optimizer") if data > 1 else "replicated",
        micro_batch=said.get("micro_batch") or recipe.data.micro_batch_size or max(1, recipe.data.batch_size // data),
        checkpointing=said.get("checkpointing", "full" if recipe.run.activation_checkpointing else "none"),
    )
    _check(layout, recipe)
    return layout


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
        f"{word!r} is no word of a layout; there are dp2 (data ranks), ep2 (of which hold all experts together), "
        f"{', '.join(SHARDING)} (what data ranks share), mb2 (windows at a time), {' and '.join(_CHECKPOINTING)} "
        "(what a layer computes again)"
    )


def _check(layout: Layout, recipe: Recipe) -> None:
    if layout.stages > 1:
        raise UsageError(f"pp{layout.stages} can be planned and not trained: use data and expert ranks")
    batch = recipe.data.batch_size
    if batch % (layout.data * layout.micro_batch):
        raise UsageError(
            f"a batch of {batch} windows is no multiple of {layout.data} data ranks times {layout.micro_batch} windows "
            "at a time; change data.batch_size, data.micro_batch_size (or mb in the layout), or the number of ranks"
        )
    if layout.data % layout.experts:
        raise UsageError(f"{layout.data} data ranks are no multiple of {layout.experts} expert ranks")
    check_expert_ranks(layout.experts, recipe.model)
    if recipe.lora and (layout.experts > 1 or layout.sharding == "fsdp"):
        raise UsageError("LoRA leaves its base whole on every rank: take a layout of data ranks alone, without fsdp")
