"""Runs on several ranks against one process: losses, gradients, loads, checkpoints, ranks that become more or fewer."""

import pytest
import torch

from ranked_runs import run, scores_in_use
from ranks import on_ranks
from small_runs import BATCH, LENGTH, recipe
from yuanmoe.checkpoint.store import open_checkpoint
from yuanmoe.checkpoint.verify import verify
from yuanmoe.config import preset
from yuanmoe.errors import UsageError
from yuanmoe.train.checkpoint import newest
from yuanmoe.train.layout import layout_of
from yuanmoe.train.recipe import BalanceSettings
from yuanmoe.train.start import new_model
from yuanmoe.train.state import Stored

STEPS = 20


def made(**changes):
    balance = BalanceSettings(auxiliary_loss=0.01, z_loss=0.001, bias_rate=1e-3)
    model = preset("tiny", vocab_size=64, tie_word_embeddings=changes.pop("tied", False), router_bias=True)
    fields = {"micro_batch_size": 2, "max_tokens": STEPS * LENGTH * BATCH, "balance": balance, **changes}
    return recipe(model=model, **fields)


def assert_same(found, expected, tolerance):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours[:3] == pytest.approx(theirs[:3], rel=tolerance, abs=1e-6)
        assert ours[3] == (None if theirs[3] is None else pytest.approx(theirs[3], rel=tolerance))
        if tolerance < 1e-3:
            assert ours[4] == theirs[4]
        assert [sum(layer) for layer in ours[4]] == [sum(layer) for layer in theirs[4]]


def assert_same_checkpoint(one, other, tolerance):
    first, second = open_checkpoint(one), open_checkpoint(other)
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        torch.testing.assert_close(second.tensors[name].read(), tensor.read(), rtol=0, atol=tolerance, msg=name)
    ours, theirs = Stored(one), Stored(other)
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name].flatten(), tensor.flatten(), rtol=0, atol=tolerance, msg=name)
    verify(one)
    verify(other)


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (2, "replicated"), (4, "optimizer full"), (2, "fsdp"), (4, "dp4 fsdp full"), (2, "ep2 replicated"),
        (4, "ep2 optimizer"), (4, "ep2 fsdp"),
    ],
)  # fmt: skip
def test_twenty_steps_are_those_of_one_process(ranks, words, tmp_path):
    alone = run(made(), None, 1, tmp_path / "alone", STEPS)
    assert alone[-1][0] < 0.8 * alone[0][0]
    for said in on_ranks(ranks, run, made(), words, ranks, tmp_path / "ranks", STEPS):
        assert_same(said, alone, 2e-4)
    assert_same_checkpoint(newest(tmp_path / "ranks"), newest(tmp_path / "alone"), 2e-3)


@pytest.mark.parametrize("words", ["replicated", "optimizer", "fsdp"])
def test_bfloat16_keeps_float32_masters(words, tmp_path):
    half = made(dtype="bfloat16", tied=True)
    alone = run(half, None, 1, tmp_path / "alone", 6)
    for said in on_ranks(2, run, half, words, 2, tmp_path / "ranks", 6):
        assert_same(said, alone, 2e-2)
    ours, theirs = newest(tmp_path / "ranks"), newest(tmp_path / "alone")
    assert {tensor.dtype for tensor in open_checkpoint(ours).tensors.values()} == {torch.bfloat16}
    assert set(Stored(ours)) == set(Stored(theirs))
    stored, weights = Stored(ours), open_checkpoint(ours).tensors
    for name in (name for name in stored if name.startswith("master.")):
        weight = weights[name.removeprefix("master.")].read()
        assert torch.equal(stored[name].bfloat16().flatten(), weight.flatten()), name


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ((2, "optimizer"), (4, "fsdp")), ((4, "ep2 fsdp"), (2, "optimizer")), ((2, "fsdp"), (1, None)),
        ((1, None), (4, "ep2 optimizer")),
    ],
)  # fmt: skip
def test_what_some_ranks_saved_others_go_on_with(first, then, tmp_path):
    whole = run(made(), None, 1, tmp_path / "alone", 8)
    for (ranks, words), steps, resume in ((first, 5, False), (then, 3, True)):
        args = (made(), words, ranks, tmp_path / "ranks", steps, resume)
        said = [run(*args)] if words is None else on_ranks(ranks, run, *args)
        for each in said:
            assert_same(each, whole[5:] if resume else whole[:5], 2e-4)
    assert_same_checkpoint(newest(tmp_path / "ranks"), newest(tmp_path / "alone"), 2e-3)


@pytest.mark.parametrize("words", ["fsdp", "ep2 fsdp", "ep2 replicated"])
def test_a_sharded_model_speaks_as_a_whole_one(words):
    model = new_model(made()).eval()
    with torch.inference_mode():
        expected = model(torch.arange(5)[None] + 3).logits
    for found in on_ranks(2, scores_in_use, made(), words, 2):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("words", "ranks", "said"),
    [
        ("dp2", 4, r"2 data ranks and 1 stages needs 2 processes, there are 4; start them with: torchrun"),
        ("fsdp", 3, r"a batch of 8 windows is no multiple of 3 data ranks times 2 windows at a time"),
        ("mb3", 2, r"a batch of 8 windows is no multiple of 2 data ranks times 3 windows at a time"),
        ("ep3", 4, r"4 data ranks are no multiple of 3 expert ranks"),
        ("zero1", 2, r"'zero1' is no word of a layout; there are dp2"),
        ("selective", 2, r"'selective' is no word of a layout"),
        ("dp2 dp2", 2, r"the layout 'dp2 dp2' says data twice"),
        ("pp2", 2, r"pp2 can be planned and not trained"),
    ],
)
def test_layouts_that_cannot_be_are_refused(words, ranks, said):
    with pytest.raises(UsageError, match=said):
        layout_of(words, ranks, made())


def test_a_layout_is_completed_from_the_recipe():
    layout = layout_of("", 4, made())
    assert layout.words == ("dp4", "pp1", "ep1", "optimizer", "mb2", "none")
    assert layout_of("", 2, recipe(activation_checkpointing=True)).words[4:] == ("mb4", "full")
    assert layout_of("", 1, made()).sharding == "replicated"
