"""What a run counts: losses by learned tokens, text by samples, the first step as one that learns."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from small_runs import BATCH, LENGTH, batches, heldout, recipe, training
from yuanmoe.train.start.model import new_model
from yuanmoe.train.state.stored import TENSORS, Stored
from yuanmoe.train.steps import guard
from yuanmoe.train.steps.loop import Training, place_in_text
from yuanmoe.train.steps.meter import metrics, read
from yuanmoe.train.steps.optim import SUMMED_AT_ONCE, square_sum


def learned_every_second(made):
    """Batches of which every second one has no learned token, the others one window alone."""

    def batch(sample):
        whole = batches(made)(sample)
        mask = np.zeros_like(whole.loss_mask)
        mask[0] = sample // made.data.batch_size % 2 == 0
        return dataclasses.replace(whole, loss_mask=mask)

    return batch


def test_steps_without_a_learned_token_are_no_sample_of_the_loss():
    made = recipe(max_tokens=60 * LENGTH * BATCH, learning_rate=1e-6)
    progress = list(Training(new_model(made), made, learned_every_second(made)))
    assert [each.loss is None for each in progress] == [False, True] * 30
    assert {each.learned for each in progress[::2]} == {LENGTH}
    reading = read(progress[-9:], made)
    assert reading.loss == pytest.approx(np.mean([each.loss for each in progress[-9:] if each.loss is not None]))
    assert read(progress[1:2], made).loss is None
    assert {"loss", "recent_loss"}.isdisjoint(metrics(progress[1], read(progress[1:2], made)))


def test_a_mean_of_losses_counts_learned_tokens():
    assert guard.mean_loss([(8.0, 1), (2.0, 3)]) == 3.5
    rare = [(8.0, 1), (2.0, 1000)] * 8
    assert "the loss is 5.000" in guard.fault(5.0, 1.0, rare, 2.0)
    assert "2.006" in guard.fault(5.0, 1.0, rare, 2.0)
    made = recipe()
    steps = list(training(made))[:2]
    weighted = [
        dataclasses.replace(each, loss=loss, learned=n) for each, loss, n in zip(steps, (8.0, 2.0), (1, 3), strict=True)
    ]
    assert read(weighted, made).loss == 3.5


def test_held_out_text_without_a_learned_token_has_no_loss():
    measured = heldout()
    blank = dataclasses.replace(measured, loss_mask=np.zeros_like(measured.loss_mask))
    made = recipe()
    run = Training(new_model(made), made, batches(made), blank)
    assert run.measure(blank) is None
    assert all(each.heldout_loss is None for each in run)


@pytest.mark.parametrize("batch_size", [4, 16])
def test_a_run_goes_on_at_the_next_sample_with_batches_of_another_size(batch_size, tmp_path):
    first = training(recipe())
    for _ in range(3):
        first.advance()
    facts = first.facts() | {"recipe": first.recipe.to_dict()}
    other = recipe(batch_size=batch_size, warmup=0.5)
    asked = []

    def batch(sample):
        asked.append(sample)
        return batches(other)(sample)

    again = Training(first.model, other, batch)
    save_file({name: tensor.contiguous() for name, tensor in first.tensors().items()}, tmp_path / TENSORS)
    again.load(Stored(tmp_path), facts)
    progress = [again.advance(), again.advance()]
    assert asked == [3 * BATCH, 3 * BATCH + batch_size]
    assert [each.tokens for each in progress] == [LENGTH * (3 * BATCH + n * batch_size) for n in (1, 2)]
    assert progress[0].share == pytest.approx(LENGTH * (3 * BATCH + batch_size) / other.schedule.max_tokens)
    before = {name: value for name, value in facts.items() if name not in ("samples", "tokens")}
    assert place_in_text(other, before) == (3 * BATCH, 3 * BATCH * LENGTH)


def test_a_norm_is_exact_where_float32_cannot_add():
    values = torch.full((3 * SUMMED_AT_ONCE,), 1e-4)
    values[0] = 4e3
    exact = 16e6 + (3 * SUMMED_AT_ONCE - 1) * float(values[1]) ** 2
    assert square_sum(values).item() == pytest.approx(exact, rel=1e-12)
    assert square_sum(torch.tensor([1e30, 1e30])).item() == pytest.approx(2e60, rel=1e-6)


def test_a_run_of_one_step_learns():
    made = recipe(max_tokens=LENGTH * BATCH)
    model, before = new_model(made), new_model(made)
    (progress,) = Training(model, made, batches(made))
    assert progress.learning_rate == made.optimizer.learning_rate
    assert not torch.equal(model.head_weight, before.head_weight)


def test_the_warm_up_begins_above_zero_in_a_budget_of_seconds_too():
    made = recipe(max_tokens=None, max_seconds=1000.0)
    assert 0 < Training(new_model(made), made, batches(made)).advance().learning_rate < made.optimizer.learning_rate
