"""A recipe as it will run: on the sizes of given weights, for longer windows, with single settings changed."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from yuanmoe.config import ModelConfig
from yuanmoe.errors import UsageError
from yuanmoe.train.recipe.recipe import Recipe
from yuanmoe.train.recipe.settings import override

Settings = Sequence[str] | Mapping[str, Any]
"""`["optimizer.learning_rate=3e-4"]` or `{"optimizer.learning_rate": 3e-4}`."""


def resolve(
    recipe: Recipe, weights: ModelConfig | None = None, *, context: int | None = None, settings: Settings = ()
) -> Recipe:
    """The recipe on weights of that configuration, for windows of `context` tokens, with `settings` last.

    Raises UsageError for LoRA without weights, and what `override` raises.
    """
    if weights is not None:
        # Torch takes seconds to import, and without weights nothing here needs it.
        from yuanmoe.train.start.model import on_weights

        recipe = on_weights(recipe, weights)
    if context is not None:
        recipe = recipe.extend_context(context)
    if isinstance(settings, Mapping):
        settings = [f"{name}={_text(value)}" for name, value in settings.items()]
    return override(recipe, settings)


def check_has_base(recipe: Recipe, weights: ModelConfig | None) -> None:
    """Raises UsageError for LoRA without weights."""
    if recipe.lora and weights is None:
        raise UsageError("LoRA adapts a model that is there: name its checkpoint with --init, in 4 bits or whole")


def _text(value: Any) -> str:
    """A value as `--set` reads it."""
    return json.dumps(list(value)) if isinstance(value, list | tuple) else str(value)
