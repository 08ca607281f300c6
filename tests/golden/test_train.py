"""A short training run on fixed data: its loss curve, its repetition bit for bit, and what its recipe refuses."""

import itertools
import math

import numpy as np
import pytest
import torch

from yuanmoe.config import preset
from yuanmoe.data.loader import ShuffledWindows, consecutive_windows
from yuanmoe.errors import ConfigError
from yuanmoe.model import experts, router
from yuanmoe.ops.cross_entropy import head_cross_entropy_reference
from yuanmoe.ops.grouped import experts_reference
from yuanmoe.ops.relations import relate_reference
from yuanmoe.plan import cost
from yuanmoe.train import loop, step
from yuanmoe.train.loop import spent, train
from yuanmoe.train.meter import Meter, balance, bits_per_byte, metrics
from yuanmoe.train.optim import learning_rate, make_optimizer, new_model
from yuanmoe.train.recipe import Recipe, nano
from yuanmoe.train.step import evaluate, forward_loss

LENGTH, BATCH = 16, 8

# Of `recipe` on `text`, in nats a token; float32 sums of another machine may differ in the last decimals. The next test
# ties the first half of it to plain operations.
CURVE = (4.1485, 4.177, 4.056, 3.9343, 3.7934, 3.6291, 3.7188, 3.4815, 3.5215, 3.4053, 3.4246, 3.6112)


def recipe(**changes):
    model = preset("tiny", vocab_size=64, tie_word_embeddings=changes.pop("tied", False))
    values = {
        "model": model,
        "sequence_length": LENGTH,
        "batch_size": BATCH,
        "learning_rate": 5e-3,
        "embedding_std": 1.0,
        "embedding_rate": 4.0,
        "max_tokens": 12 * LENGTH * BATCH,
        "measurements": 3,
    }
    return Recipe(**values | changes)


def text():
    """Counting up by steps of 1 to 3 that change now and then: learnable from the last two tokens."""
    rng = np.random.default_rng(0)
    return (3 + np.cumsum(np.repeat(rng.integers(1, 4, size=400), 10)) % 61).astype(np.uint16)


def run(made, steps=None):
    """The trained model and its progress."""
    batches = ShuffledWindows(text(), length=LENGTH, batch_size=BATCH, seed=made.seed)
    model = new_model(made)
    heldout = consecutive_windows(text()[-200:], length=LENGTH)
    return model, list(itertools.islice(train(model, made, batches.batch, heldout), steps))


def test_the_loss_curve_is_the_known_one():
    model, progress = run(recipe())
    assert [each.loss for each in progress] == pytest.approx(CURVE, abs=2e-3)
    assert [each.step for each in progress if each.heldout_loss is not None] == [4, 8, 12]
    heldout = torch.from_numpy(consecutive_windows(text()[-200:], length=LENGTH))
    assert progress[-1].heldout_loss == evaluate(model, heldout)
    assert progress[-1].share == 1
    assert progress[-1].tokens == 12 * LENGTH * BATCH


def test_the_loss_curve_is_that_of_plain_operations(monkeypatch):
    fast = [each.loss for each in run(recipe(), 6)[1]]
    monkeypatch.setattr(router, "relate", relate_reference)
    monkeypatch.setattr(step, "head_cross_entropy", head_cross_entropy_reference)
    monkeypatch.setattr(experts, "experts_forward", experts_reference)
    assert [each.loss for each in run(recipe(), 6)[1]] == pytest.approx(fast, abs=2e-4)


def test_a_text_that_repeats_is_learned_by_heart():
    made = recipe(learning_rate=3e-3, embedding_rate=1.0, embedding_std=None, max_tokens=40 * LENGTH * BATCH)
    ids = np.tile(np.random.default_rng(0).permutation(61) + 3, 20).astype(np.uint16)
    batches = ShuffledWindows(ids, length=LENGTH, batch_size=BATCH, seed=0)
    losses = [each.loss for each in train(new_model(made), made, batches.batch)]
    assert losses[0] == pytest.approx(math.log(64), rel=0.02)
    assert losses[-1] < losses[0] / 2


def test_a_run_repeats_bit_for_bit():
    (first, one), (second, other) = run(recipe(), 4), run(recipe(), 4)
    assert [each.loss for each in one] == [each.loss for each in other]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert run(recipe(seed=1), 1)[1][0].loss != one[0].loss


def test_a_new_model_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    model = new_model(recipe())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(1, rel=0.1)
    assert new_model(recipe(embedding_std=None)).model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_stopping_early_keeps_what_was_learned():
    model, progress = run(recipe(), 3)
    assert len(progress) == 3
    assert progress[-1].share < 1
    assert not torch.equal(model.head_weight, new_model(recipe()).head_weight)


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_in_one_group_and_only_matrices_of_layers_decay(tied):
    made = recipe(tied=tied, weight_decay=0.3, head_rate=2.0)
    model = new_model(made)
    groups = make_optimizer(model, made).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert sorted(names.values()) == sorted(names[parameter] for group in groups for parameter in group["params"])
    decaying = {names[parameter] for group in groups if group["weight_decay"] for parameter in group["params"]}
    assert decaying == {
        name for name, parameter in model.model.layers.named_parameters("model.layers") if parameter.ndim > 1
    }
    rates = {names[parameter]: group["rate"] for group in groups for parameter in group["params"]}
    assert rates["model.embed_tokens.weight"] == 4.0
    assert rates.get("lm_head.weight", 2.0) == 2.0
    assert rates["model.norm.weight"] == 1.0


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine():
    made = recipe(learning_rate=2.0, warmup=0.2, final_learning_rate=0.1)
    shares = [0.0, 0.1, 0.2, 0.6, 1.0]
    assert [learning_rate(made, share) for share in shares] == pytest.approx([0.0, 1.0, 2.0, 1.1, 0.2])
    assert learning_rate(recipe(learning_rate=2.0, warmup=0.0), 0.0) == 2.0
    assert learning_rate(recipe(learning_rate=2.0, warmup=1.0), 1.0) == 2.0


def test_the_first_budget_to_run_out_ends_the_run(monkeypatch):
    both = recipe(max_tokens=4 * LENGTH * BATCH, max_seconds=10.0)
    assert spent(both, 1, 9.0) == pytest.approx(0.9)
    assert spent(both, 3, 1.0) == pytest.approx(0.75)
    assert spent(both, 5, 99.0) == 1.0
    seconds = itertools.count()
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(seconds)))
    progress = run(recipe(max_tokens=None, max_seconds=20.0, measurements=1))[1]
    shares = [each.share for each in progress]
    assert 2 < len(shares) < 20
    assert shares == sorted(shares)
    assert shares[-2] < 1 == shares[-1]
    assert progress[-1].elapsed_s >= 20


def test_a_model_that_is_measured_drops_nothing():
    made = recipe(model=preset("tiny", vocab_size=64, attention_dropout=0.5))
    model = new_model(made).train()
    windows = torch.from_numpy(consecutive_windows(text()[:200], length=LENGTH))
    exact = forward_loss(model.eval(), windows)[0].item()
    assert evaluate(model.train(), windows, batch_size=5) == pytest.approx(exact, rel=1e-5)
    assert model.training


def test_a_meter_reads_the_last_steps():
    made = recipe()
    meter, progress = Meter(made), run(made)[1]
    for each in progress:
        reading = meter.read(each)
    assert reading.loss == pytest.approx(sum(each.loss for each in progress) / 12)
    seconds = sum(each.step_s for each in progress)
    assert reading.tokens_per_s == pytest.approx(12 * LENGTH * BATCH / seconds)
    assert meter.tokens_per_s == pytest.approx(reading.tokens_per_s)
    assert reading.flops_per_s == pytest.approx(
        reading.tokens_per_s * cost.training_flops(made.model, (LENGTH + 1) / 2)
    )
    assert [sum(load) for load in reading.load] == [12 * LENGTH * BATCH * 2] * 2
    line = metrics(progress[3], reading)
    assert {"step", "tokens", "loss", "heldout_loss", "tokens_per_s", "balance"} <= line.keys()
    assert "heldout_loss" not in metrics(progress[0], reading)


def test_balance_of_known_loads():
    even = balance([5, 5, 5, 5])
    assert (even.max_over_mean, even.dead_experts) == (1.0, 0)
    assert even.effective_experts == pytest.approx(4)
    uneven = balance([6, 2, 0, 0])
    assert (uneven.max_over_mean, uneven.dead_experts) == (3.0, 2)
    assert uneven.effective_experts == pytest.approx(math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4)))


def test_bits_per_byte():
    assert bits_per_byte(math.log(2) * 6, 3.0) == pytest.approx(2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; it must be a number above 0"),
        ({"max_seconds": -1.0}, "max_seconds is -1.0; it must be a number above 0"),
        ({"max_seconds": math.inf}, "max_seconds is inf; it must be a number above 0"),
        ({"warmup": 1.5}, "warmup is 1.5; it is a share, from 0 to 1"),
        ({"final_learning_rate": -0.1}, "final_learning_rate is -0.1; it is a share"),
        ({"max_tokens": None}, "a run needs an end: give max_tokens, max_seconds or both"),
        ({"sequence_length": 257}, "sequence_length 257 exceeds the model's context of 256"),
    ],
)
def test_a_recipe_that_describes_no_run_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        recipe(**changes)


def test_nano_is_a_recipe_that_can_be_written_down():
    values = nano(max_seconds=3.0).to_dict()
    assert values["max_seconds"] == 3.0
    assert values["model"]["num_experts"] == 32
