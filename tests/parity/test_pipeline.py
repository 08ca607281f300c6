"""A model cut into unequal stages against the whole in one process: losses, gradients, training, what is refused."""

import pytest
import torch

import sharded_work as work
from ranks import on_ranks
from small_models import random_ids, small_config
from yuanmoe.train.expert_parallel import is_expert
from yuanmoe.train.recipe import BalanceSettings
from yuanmoe.train.stages import EMBEDDING
from yuanmoe.train.step import Windows, evaluate, learn, window_losses

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
    held = set()
    for learned, of_stage, measured, sums in found:
        torch.testing.assert_close(learned.loss, alone.loss)
        torch.testing.assert_close(learned.balance_loss, alone.balance_loss)
        assert [load.tolist() for load in learned.load] == [load.tolist() for load in alone.load]
        held |= set(of_stage)
        expected = {name: gradients[name] for name in of_stage}
        torch.testing.assert_close(of_stage, expected, rtol=1e-4, atol=1e-6)
        assert measured == pytest.approx(evaluate(model, seen), rel=1e-5)
        counts = seen.learned.sum(dim=1).clamp(min=1).tolist()
        assert [total / count for total, count in zip(sums, counts, strict=True)] == pytest.approx(
            window_losses(model, seen), rel=1e-5
        )
    assert held == set(gradients)
    assert sum(len(of_stage) for _, of_stage, _, _ in found) == len(gradients) + config.tie_word_embeddings


@pytest.mark.parametrize(("tied", "layers"), [(True, (1, 3)), (True, (2, 1, 1)), (False, (1, 2, 1))])
def test_twenty_steps_are_those_of_one_process(tied, layers):
    config, seen = four_layers(tie_word_embeddings=tied, router_bias=not tied), windows(4)
    losses, norms, weights = work.run_alone(config, seen, 20, BALANCED, torch.float32)
    assert losses[-1] < 0.7 * losses[0]
    for of_rank, norms_of_rank, of_stage in on_ranks(
        len(layers), work.pipeline_run, config, layers, seen, 20, BALANCED, torch.float32
    ):
        assert of_rank == pytest.approx(losses, rel=1e-4)
        assert norms_of_rank == pytest.approx(norms, rel=1e-3)
        torch.testing.assert_close(of_stage, {name: weights[name] for name in of_stage}, rtol=1e-2, atol=1e-3)


def test_both_copies_of_a_tied_embedding_stay_equal_to_the_bit():
    config, layers = four_layers(), (1, 2, 1)
    first, _, last = on_ranks(3, work.pipeline_run, config, layers, windows(4), 5, NONE, torch.bfloat16)
    assert first[0][-1] < first[0][0]
    assert torch.equal(first[2][EMBEDDING], last[2][EMBEDDING])


@pytest.mark.parametrize("balance", [NONE, BALANCED])
def test_pipelines_with_experts_on_ranks_are_one_process(balance):
    config, seen = four_layers(), windows(4)
    losses, norms, weights = work.run_alone(config, seen, 20, balance, torch.float32)
    held = {}
    for of_rank, norms_of_rank, rows, of_stage in on_ranks(4, work.pipelines_run, config, (1, 3), seen, 20, balance):
        assert of_rank == pytest.approx(losses, rel=1e-4)
        assert norms_of_rank == pytest.approx(norms, rel=1e-3)
        held |= {(name, rows if is_expert(name) else 0): tensor for name, tensor in of_stage.items()}
    for name, weight in weights.items():
        whole = torch.cat([held[name, 0], held[name, 1]]) if is_expert(name) else held[name, 0]
        torch.testing.assert_close(whole, weight, rtol=1e-2, atol=1e-3)


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
