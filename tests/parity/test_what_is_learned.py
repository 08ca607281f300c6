"""Loss masks, documents and mixtures in training: only the tokens that count move the model, and each as it should."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from small_documents import Lists
from small_runs import BATCH, LENGTH, TINY, batches, recipe, whole_batch
from small_tokenizers import bpe
from yuanmoe.data.loader.loader import Batch, Loader, LoaderOptions, WeightedDocuments
from yuanmoe.data.prepare.formats import FormatOptions
from yuanmoe.data.prepare.pack import PackOptions, pack_dataset, pack_texts
from yuanmoe.presets import preset
from yuanmoe.text.tokenizer import FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX
from yuanmoe.train.recipe.recipe import BalanceSettings
from yuanmoe.train.recipe.recipes import named
from yuanmoe.train.recipe.settings import override
from yuanmoe.train.start.data import open_data
from yuanmoe.train.start.model import new_model
from yuanmoe.train.steps.loop import Training
from yuanmoe.train.steps.step import Windows, evaluate, learn, window_losses

NONE = BalanceSettings()


def masked_batch():
    """Windows of which very different parts are learned: nothing, one token, all, and something between."""
    rng = np.random.default_rng(0)
    batch = whole_batch(rng.integers(3, 64, size=(BATCH, LENGTH + 1)))
    mask = rng.random((BATCH, LENGTH)) < np.linspace(0, 1, BATCH)[:, None]
    mask[1] = np.arange(LENGTH) == 5
    return replace(batch, loss_mask=mask)


def plain_loss(model, batch):
    """Sum of the losses that count over their number, from all logits at once."""
    ids = torch.from_numpy(batch.ids)
    losses = F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    mask = torch.from_numpy(batch.loss_mask).flatten()
    return (losses * mask).sum() / mask.sum()


@pytest.mark.parametrize("at_once", [1, 3, BATCH])
def test_a_masked_step_is_the_mean_over_what_counts_however_it_is_split(at_once):
    batch, model, plain = masked_batch(), new_model(recipe()), new_model(recipe())
    learned = learn(model, Windows.of(batch, "cpu"), at_once, NONE)
    wanted = plain_loss(plain, batch)
    wanted.backward()
    torch.testing.assert_close(learned.loss, wanted.detach(), rtol=1e-5, atol=1e-6)
    for (name, got), exact in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, exact.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert evaluate(model, Windows.of(batch, "cpu"), batch_size=at_once) == pytest.approx(wanted.item(), rel=1e-5)


def test_a_batch_in_which_nothing_counts_moves_nothing_and_is_no_fault():
    batch = whole_batch(np.full((BATCH, LENGTH + 1), 7))
    batch = replace(batch, loss_mask=np.zeros_like(batch.loss_mask))
    made = recipe(max_tokens=LENGTH * BATCH, weight_decay=0.0)
    model, before = new_model(made), new_model(made)
    (progress,) = Training(model, made, lambda _: batch)
    assert (progress.loss, progress.learned, progress.gradient_norm) == (None, 0, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert window_losses(model, Windows.of(batch[:2], "cpu")) == [0.0, 0.0]


def test_a_target_that_does_not_count_may_be_anything():
    batch, model = masked_batch(), new_model(recipe())
    other = batch.ids.copy()
    # Nobody reads the last token of a window.
    rows = ~batch.loss_mask[:, -1]
    assert rows.any()
    other[rows, -1] = 66 - other[rows, -1]
    first, second = (evaluate(model, Windows.of(each, "cpu")) for each in (batch, replace(batch, ids=other)))
    assert first == second


@pytest.mark.parametrize("packing", ["continuous", "megatron", "hf-mask", "isolated"])
def test_documents_of_a_batch_are_those_that_end_with_eod(packing):
    """The loader's numbers, and the ones that the model finds itself, restart at the same places."""
    rng = np.random.default_rng(0)
    texts = [[*rng.integers(3, 64, size=size), 0] for size in rng.integers(1, 30, size=40)]
    options = LoaderOptions(length=LENGTH, batch_size=BATCH, vocab_size=64)
    batch = Loader([WeightedDocuments(documents=Lists(texts))], options).batch(0)
    model = new_model(recipe(model=preset("tiny", vocab_size=64, packing=packing))).eval()
    told, found = Windows.of(batch, "cpu"), Windows(torch.from_numpy(batch.ids))
    assert evaluate(model, told) == evaluate(model, found)


def conversations(folder):
    line = (
        '{"messages": [{"role": "user", "content": "add a and b"}, {"role": "assistant", "content": "return a + b"},'
        ' {"role": "user", "content": "%d again"}, {"role": "assistant", "content": "return b + a"}]}'
    )
    (folder / "talks.jsonl").write_text("\n".join(line % number for number in range(40)))
    options = PackOptions(read=FormatOptions(format="chat", heldout_share=0.2))
    pack_dataset([folder / "talks.jsonl"], folder / "chat", bpe(), options)
    return folder / "chat"


def test_only_what_the_assistant_said_is_learned(tmp_path):
    made = override(named("nano"), [*TINY, "data.batch_size=8"])
    data = open_data([(1.0, conversations(tmp_path))], made)
    batch = data.batch(0)
    assert 0.3 < batch.loss_mask.mean() < 0.8
    said = "".join(bpe().decode(batch.ids[row, 1:][batch.loss_mask[row]].tolist()) for row in range(len(batch)))
    assert "return" in said
    assert "again" not in said
    assert "add" not in said
    # Bytes of whole texts say nothing of answers alone.
    assert data.bytes_per_token is None
    official = open_data([(1.0, tmp_path / "chat")], override(made, ["data.loss_mask=official"])).batch(0)
    assert (official.ids == batch.ids).all()
    assert official.loss_mask.sum() > batch.loss_mask.sum()


def test_sources_come_by_weight_and_documents_are_rearranged_as_asked(tmp_path):
    rng = np.random.default_rng(0)
    for letters in ("abc", "xyz"):
        texts = ["".join(rng.choice(list(letters), 60)) for _ in range(60)]
        pack_texts(texts, tmp_path / letters, bpe())
    places = [(3.0, tmp_path / "abc"), (1.0, tmp_path / "xyz")]
    made = override(named("nano"), [*TINY, "data.batch_size=64", "data.sequence_length=8"])
    ids = np.concatenate([open_data(places, made).batch(64 * number).ids for number in range(16)])
    of_abc = sum(any(letter in bpe().decode(row.tolist()) for letter in "abc") for row in ids)
    assert of_abc == pytest.approx(768, abs=3)
    marks = [bpe().special_tokens[name] for name in (FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE)]
    assert not np.isin(ids, marks).any()
    filled = open_data(places, override(made, ["data.fim_rate=1.0"])).batch(0).ids
    assert all((filled == mark).any() for mark in marks)


def test_fine_tuning_learns_answers_and_leaves_questions_alone():
    """Answers repeat their question; questions are noise that no model can learn."""
    made = recipe(max_tokens=60 * LENGTH * BATCH, learning_rate=1e-2)

    def batch(step):
        ids = np.random.default_rng(step).integers(3, 60, size=(BATCH, LENGTH + 1))
        ids[:, 1::2] = ids[:, 0:-1:2]
        return replace(whole_batch(ids), loss_mask=np.tile(np.arange(LENGTH) % 2 == 0, (BATCH, 1)))

    losses = [each.loss for each in Training(new_model(made), made, batch)]
    assert losses[-1] < 0.5 * losses[0]
    everything = [each.loss for each in Training(new_model(made), made, lambda step: whole_batch(batch(step).ids))]
    assert everything[-1] > math.log(57) / 2 - 0.2


def test_a_batch_is_cut_like_an_array():
    batch = batches(recipe())(0)
    part = batch[1:4:2]
    assert isinstance(part, Batch)
    assert len(part) == 2
    assert (part.ids == batch.ids[[1, 3]]).all()
