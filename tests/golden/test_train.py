"""A short training run on fixed data: its loss curve, and its repetition bit for bit."""

import itertools
import math

import numpy as np
import pytest
import torch

from small_documents import Lists
from small_runs import BATCH, LENGTH, batches, heldout, recipe, training, whole_batch
from yuanmoe.data.loader.loader import Loader, LoaderOptions, WeightedDocuments
from yuanmoe.errors import DataError
from yuanmoe.model import experts, router
from yuanmoe.ops.cross_entropy import head_cross_entropy_reference
from yuanmoe.ops.products.grouped import experts_reference
from yuanmoe.ops.relations import relate_reference
from yuanmoe.plan import cost
from yuanmoe.presets import preset
from yuanmoe.train.start.model import new_model
from yuanmoe.train.steps import loop, step
from yuanmoe.train.steps.loop import Training
from yuanmoe.train.steps.meter import balance, bits_per_byte, flops_per_token, metrics, read
from yuanmoe.train.steps.step import Windows, evaluate, forward_loss

# Of `recipe` on `text`, in nats a token; float32 sums of another machine may differ in the last decimals. The next test
# ties the first half of it to plain operations.
CURVE = (4.1787, 4.0823, 3.9679, 3.8489, 3.7096, 3.6298, 3.4513, 3.4509, 3.4208, 3.2909, 3.3001, 3.2835)


def run(made, steps=None):
    """The trained model and its progress."""
    made = training(made)
    return made.model, list(itertools.islice(made, steps))


def test_the_loss_curve_is_the_known_one():
    model, progress = run(recipe())
    assert [each.loss for each in progress] == pytest.approx(CURVE, abs=2e-3)
    assert [each.step for each in progress if each.heldout_loss is not None] == [4, 8, 12]
    assert [each.milestone for each in progress if each.milestone] == [1, 2, 3]
    assert progress[-1].heldout_loss == evaluate(model, Windows.of(heldout(), "cpu"))
    assert progress[-1].share == 1
    assert progress[-1].tokens == 12 * LENGTH * BATCH


def test_the_loss_curve_is_that_of_plain_operations(monkeypatch):
    fast = [each.loss for each in run(recipe(), 6)[1]]
    monkeypatch.setattr(router, "relate", relate_reference)
    monkeypatch.setattr(step, "head_cross_entropy", head_cross_entropy_reference)
    # The reference knows nothing of low-rank factors, of which there are none.
    monkeypatch.setattr(experts, "experts_forward", lambda *args, **_: experts_reference(*args[:5]))
    assert [each.loss for each in run(recipe(), 6)[1]] == pytest.approx(fast, abs=2e-4)


def test_a_text_that_repeats_is_learned_by_heart():
    made = recipe(learning_rate=3e-3, embedding_rate=1.0, embedding_std=None, max_tokens=40 * LENGTH * BATCH)
    ids = np.tile(np.random.default_rng(0).permutation(61) + 3, 20).astype(np.uint16)
    options = LoaderOptions(length=LENGTH, batch_size=BATCH, vocab_size=64)
    loader = Loader([WeightedDocuments(documents=Lists([ids]))], options)
    losses = [each.loss for each in Training(new_model(made), made, loader.batch)]
    assert losses[0] == pytest.approx(math.log(64), rel=0.02)
    assert losses[-1] < losses[0] / 2


def test_a_run_repeats_bit_for_bit_whatever_the_global_generator_does():
    made = recipe(model=preset("tiny", vocab_size=64, attention_dropout=0.2))
    first, one = run(made, 4)
    torch.manual_seed(77)
    second, other = run(made, 4)
    assert [each.loss for each in one] == [each.loss for each in other]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert run(recipe(seed=1), 1)[1][0].loss != one[0].loss


def test_dropout_differs_from_step_to_step():
    made = recipe(model=preset("tiny", vocab_size=64, attention_dropout=0.5), warmup=1.0, learning_rate=1e-30)
    same = batches(made)(0)
    first, second = (each.loss for each in itertools.islice(Training(new_model(made), made, lambda _: same), 2))
    assert first != second
    assert first == pytest.approx(second, rel=0.05)


def test_training_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    run(recipe(model=preset("tiny", vocab_size=64, attention_dropout=0.2)), 1)
    assert torch.equal(torch.random.get_rng_state(), before)
    model = new_model(recipe())
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(1, rel=0.1)
    assert new_model(recipe(embedding_std=None)).model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_stopping_early_keeps_what_was_learned():
    model, progress = run(recipe(), 3)
    assert len(progress) == 3
    assert progress[-1].share < 1
    assert not torch.equal(model.head_weight, new_model(recipe()).head_weight)


def test_a_budget_in_seconds_ends_the_run(monkeypatch):
    seconds = itertools.count()
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(seconds)))
    progress = run(recipe(max_tokens=None, max_seconds=20.0, milestones=1))[1]
    shares = [each.share for each in progress]
    assert 2 < len(shares) < 20
    assert shares == sorted(shares)
    assert shares[-2] < 1 == shares[-1]
    assert progress[-1].elapsed_s >= 20


def test_a_model_that_is_measured_drops_nothing():
    made = recipe(model=preset("tiny", vocab_size=64, attention_dropout=0.5))
    model = new_model(made).train()
    windows = Windows.of(heldout(), "cpu")
    exact = forward_loss(model.eval(), windows)[0].item()
    assert evaluate(model.train(), windows, batch_size=5) == pytest.approx(exact, rel=1e-5)
    assert model.training


def test_ids_outside_the_vocabulary_are_refused_before_they_are_learned():
    made = recipe()
    ids = np.full((BATCH, LENGTH + 1), 3)
    ids[1, 2] = 64
    with pytest.raises(DataError, match="batch 0 holds token ids 3 to 64, the model's vocabulary ends at 63"):
        Training(new_model(made), made, lambda _: whole_batch(ids)).advance()


def test_what_the_last_steps_say_together():
    made = recipe()
    progress = run(made)[1]
    reading = read(progress[-5:], made)
    assert reading.loss == pytest.approx(sum(each.loss for each in progress[-5:]) / 5)
    assert reading.tokens_per_s == pytest.approx(5 * LENGTH * BATCH / sum(each.step_s for each in progress[-5:]))
    assert flops_per_token(made) == cost.training_flops(made.model, (LENGTH + 1) / 2)
    assert reading.flops_per_s == pytest.approx(reading.tokens_per_s * flops_per_token(made))
    chosen = made.model.num_experts_per_tok
    assert [sum(layer) for layer in reading.load] == [5 * LENGTH * BATCH * chosen] * 2
    line = metrics(progress[-1], reading)
    assert line["heldout_loss"] == progress[-1].heldout_loss
    assert line["load"] == reading.load
    assert {"load", "heldout_loss", "milestone"}.isdisjoint(metrics(progress[0], reading))


def test_balance_of_known_loads():
    even = balance([5, 5, 5, 5])
    assert (even.max_over_mean, even.dead_experts, even.coefficient_of_variation) == (1.0, 0, 0.0)
    assert even.entropy == pytest.approx(math.log(4))
    uneven = balance([6, 2, 0, 0])
    assert (uneven.max_over_mean, uneven.dead_experts) == (3.0, 2)
    assert uneven.coefficient_of_variation == pytest.approx(np.std([6, 2, 0, 0]) / 2)
    assert uneven.entropy == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    assert uneven.effective_experts == pytest.approx(math.exp(uneven.entropy))


def test_bits_per_byte():
    assert bits_per_byte(math.log(2) * 6, 3.0) == pytest.approx(2)
