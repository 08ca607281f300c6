"""A model cut into unequal stages against the whole in one process: losses, gradients, training, what is refused."""

import pytest
import torch

import sharded_work as work
from ranks import on_ranks
from small_models import random_ids, small_config
from yuanmoe.train.recipe.recipe import BalanceSettings
from yuanmoe.train.steps.step import Windows, evaluate, learn, window_losses

NONE, BALANCED = BalanceSettings(), BalanceSettings(auxiliary_loss=0.1, z_loss=0.01)

CASES = {
    "m32": ({}, (1, 3), NONE, "1f1b", False),
    "untied": ({"tie_word_embeddings": False}, (3, 1), NONE, "1f1b", True),
    "balanced": ({}, (1, 2, 1), BALANCED, "1f1b", True),
    "balanced, untied": ({"tie_word_embeddings": False}, (2, 1, 1), BALANCED, "gpipe", False),
    "experts by layer": ({"num_experts": (8, 0, 0, 4), "intermediate_size": 20}, (1, 2, 1), BALANCED, "1f1b", False),
    "shared experts": ({"router": "shared-expert", "num_shared_experts": 1}, (2, 2), BALANCED, "gpipe", True),
    "documents apart": ({"packing": "isolated"}, (1, 3), NONE, "1f1b", True),
}
"""Changes of a model, layers of its stages, losses, schedule, and whether layers are computed twice."""


def four_layers(**changes):
    return small_config(num_hidden_layers=4, **changes)


def windows(count=6):
    """Windows with some tokens that are not learned, one window without any."""
    ids = random_ids(count, 13)
    learned = torch.rand(count, 12) < 0.7
    learned[1] = False
    return Windows(ids, learned)


@pytest.mark.parametrize("case", CASES)
def test_stages_learn_what_one_process_does(case):
    changes, layers, balance, schedule, twice = CASES[case]
    config, seen = four_layers(**changes), windows()
    model = work.steered_model(config)
    alone = learn(model, seen, 2, balance)
    found = on_ranks(len(layers), work.pipeline_step, config, layers, seen, balance, schedule, twice)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    sums_of = {}
    for learned, of_stage, measured, sums in found:
        torch.testing.assert_close(learned.loss, alone.loss)
        torch.testing.assert_close(learned.balance_loss, alone.balance_loss)
        assert [load.tolist() for load in learned.load] == [load.tolist() for load in alone.load]
        for name, gradient in of_stage.items():
            sums_of[name] = sums_of.get(name, 0) + gradient
        assert measured == pytest.approx(evaluate(model, seen), rel=1e-5)
        counts = seen.learned.sum(dim=1).clamp(min=1).tolist()
        assert [total / count for total, count in zip(sums, counts, strict=True)] == pytest.approx(
            window_losses(model, seen), rel=1e-5
        )
    torch.testing.assert_close(sums_of, gradients, rtol=1e-4, atol=1e-6)
    assert sum(len(of_stage) for _, of_stage, _, _ in found) == len(gradients) + config.tie_word_embeddings


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ((1, 2), "stages 1,2 have 3 layers together; the model has 4"),
        ((4, 0), "stages 4,0: each needs at least one layer"),
        ((), "stages : each needs at least one layer"),
        ((4,), "1 stages need as many ranks; this pipeline has 2"),
        ((2, 1, 1), "2 devices are not a multiple of 3 stages; there can be 1, 2 stages"),
    ],
)
def test_stages_that_do_not_fit_are_refused(layers, said):
    for kind, message in on_ranks(2, work.bad_stages, four_layers(), layers):
        assert (kind, message) == ("UsageError", said)
