"""A short training run: it learns, and it repeats bit for bit."""

import numpy as np
import pytest

from yuanmoe.config import preset
from yuanmoe.data.loader import ShuffledWindows
from yuanmoe.errors import ConfigError
from yuanmoe.train.loop import train
from yuanmoe.train.optim import learning_rate, new_model
from yuanmoe.train.recipe import Recipe, nano


def recipe(**changes: object) -> Recipe:
    return Recipe(
        model=preset("tiny"), sequence_length=32, batch_size=8, learning_rate=3e-3, max_tokens=40 * 256
    ).replace(**changes)


def losses(settings: Recipe) -> list[float]:
    """A text of 64 tokens over and over: what follows is certain once it is known."""
    pattern = np.random.default_rng(0).integers(3, 512, size=64)
    ids = np.tile(pattern, 64).astype(np.uint16)
    batches = ShuffledWindows(ids, length=settings.sequence_length, batch_size=settings.batch_size, seed=settings.seed)
    return [progress.loss for progress in train(new_model(settings), settings, batches.batch)]


def test_it_starts_at_chance_and_learns_the_text() -> None:
    curve = losses(recipe())
    assert len(curve) == 40
    assert curve[0] == pytest.approx(np.log(512), rel=0.02)
    assert curve[-1] < curve[0] / 2


def test_it_repeats_bit_for_bit() -> None:
    assert losses(recipe()) == losses(recipe())
    assert losses(recipe()) != losses(recipe(seed=1))


def test_the_learning_rate_rises_and_falls() -> None:
    settings = recipe(warmup=0.1, final_learning_rate=0.1)
    rates = [learning_rate(settings, share) / settings.learning_rate for share in (0.0, 0.05, 0.1, 0.55, 1.0)]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.55, 0.1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, r"learning_rate is 0\.0; it must be above 0"),
        ({"warmup": 1.5}, r"warmup is 1\.5; it is a share"),
        ({"max_tokens": None}, "a run needs an end"),
        ({"sequence_length": 512}, r"sequence_length 512 exceeds the model's context of 256"),
    ],
)
def test_a_recipe_that_describes_no_run_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(**changes)


def test_nano_is_a_mixture_of_32_experts() -> None:
    model = nano().model
    assert (model.router, model.experts_per_layer, model.num_experts_per_tok) == ("attention", (32, 32), 2)
    assert model.localized_filtering
