"""Runs on several ranks against one process: losses, gradients, loads, checkpoints, ranks that become more or fewer."""

import dataclasses

import pytest
import torch

from ranked_runs import embedding_after, run, scores_in_use
from ranks import on_ranks
from small_runs import BATCH, LENGTH, recipe
from yuanmoe.checkpoint.open import open_checkpoint
from yuanmoe.checkpoint.write.verify import verify_checkpoint
from yuanmoe.errors import UsageError
from yuanmoe.model.lora.targets import LoraSettings
from yuanmoe.presets import preset
from yuanmoe.train.parallel.layout import layout_of
from yuanmoe.train.recipe.recipe import BalanceSettings
from yuanmoe.train.start.model import new_model
from yuanmoe.train.state.checkpoint import newest
from yuanmoe.train.state.stored import Stored

STEPS = 20


def slow(*values):
    """A case of a kind that a shorter case covers too."""
    return pytest.param(*values, marks=pytest.mark.slow)


def made(**changes):
    balance = BalanceSettings(auxiliary_loss=0.01, z_loss=0.001, bias_rate=1e-3)
    sizes = {"num_hidden_layers": changes.pop("layers", 2), "tie_word_embeddings": changes.pop("tied", False)}
    model = preset("tiny", vocab_size=64, router_bias=True, **sizes)
    # What another order of sums changes grows with every step until it decides between two experts: a model that begins
    # small and learns slowly stays clear of that for these few steps.
    fields = {
        "micro_batch_size": 2,
        "max_tokens": STEPS * LENGTH * BATCH,
        "learning_rate": 2e-3,
        "warmup": 0.5,
        "embedding_std": 0.1,
        "balance": balance,
        **changes,
    }
    return recipe(model=model, **fields)


FLIPPED = 2
"""Choices of a layer in a step that may fall on another expert, where sums in another order decide between two scores
that tie; of 128 or more."""


def assert_same(found, expected, tolerance):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours[:3] == pytest.approx(theirs[:3], rel=tolerance, abs=1e-6)
        assert ours[3] == (None if theirs[3] is None else pytest.approx(theirs[3], rel=tolerance))
        if tolerance < 1e-3:
            for one, other in zip(ours[4], theirs[4], strict=True):
                assert sum(abs(a - b) for a, b in zip(one, other, strict=True)) <= 2 * FLIPPED
        assert [sum(layer) for layer in ours[4]] == [sum(layer) for layer in theirs[4]]


MOVED = 0.01
"""Share of a tensor's numbers that may differ by more than rounding: those of experts that a flipped choice taught."""


def assert_same_checkpoint(one, other, tolerance):
    first, second = open_checkpoint(one), open_checkpoint(other)
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        assert_close(second.tensors[name].read(), tensor.read(), tolerance, name)
    ours, theirs = Stored(one), Stored(other)
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert_close(theirs[name].flatten(), tensor.flatten(), tolerance, name)
    verify_checkpoint(one)
    verify_checkpoint(other)


def assert_close(found, expected, tolerance, name):
    difference = (found.float() - expected.float()).abs()
    assert (difference > tolerance).float().mean().item() <= MOVED, name
    assert difference.max().item() <= 10 * tolerance, name


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process says, and its checkpoint."""
    folder = tmp_path_factory.mktemp("alone")
    said = run(made(), None, 1, folder, STEPS)
    assert said[-1][0] < 0.8 * said[0][0]
    return said, newest(folder)


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (2, "replicated"), slow(4, "optimizer full"), (2, "fsdp"), slow(4, "dp4 fsdp full"), (2, "ep2 replicated"),
        (4, "ep2 optimizer"), slow(4, "ep2 fsdp"),
    ],
)  # fmt: skip
def test_twenty_steps_are_those_of_one_process(ranks, words, alone, tmp_path):
    for said in on_ranks(ranks, run, made(), words, ranks, tmp_path / "ranks", STEPS):
        assert_same(said, alone[0], 2e-4)
    assert_same_checkpoint(newest(tmp_path / "ranks"), alone[1], 2e-3)


@pytest.mark.parametrize(
    ("ranks", "words", "layers", "tied"),
    [
        (2, "pp2 full", "2,1", False), slow(2, "pp2", "1,2", True), (2, "pp2 optimizer", "1,2", True),
        slow(3, "pp3", None, True),
        slow(4, "dp2 pp2 optimizer", "1,2", True), (4, "dp2 pp2 ep2 replicated", "2,1", True),
    ],
)  # fmt: skip
def test_twenty_steps_of_pipelines_are_those_of_one_process(ranks, words, layers, tied, tmp_path):
    # Where the embedding is tied rounding soon decides between two experts, unless it begins small and learns slowly.
    three = made(layers=3, tied=tied, **({"learning_rate": 1e-3, "embedding_std": 0.1} if tied else {}))
    alone = run(three, None, 1, tmp_path / "alone", STEPS)
    assert alone[-1][0] < 0.8 * alone[0][0]
    for said in on_ranks(ranks, run, three, words, ranks, tmp_path / "ranks", STEPS, False, layers):
        assert_same(said, alone, 2e-4)
    assert_same_checkpoint(newest(tmp_path / "ranks"), newest(tmp_path / "alone"), 2e-3)


@pytest.mark.parametrize(("ranks", "words"), [(2, "pp2"), (4, "dp2 pp2 optimizer")])
def test_both_copies_of_a_tied_embedding_stay_equal_to_the_bit(ranks, words):
    half = made(dtype="bfloat16", tied=True)
    first, *others = on_ranks(ranks, embedding_after, half, words, ranks, 3)
    assert not torch.equal(first, new_model(half).model.embed_tokens.weight)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("words", ["replicated", "optimizer", "fsdp", "pp2"])
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
        ((2, "optimizer"), (4, "fsdp")), slow((4, "ep2 fsdp"), (2, "optimizer")), ((2, "fsdp"), (1, None)),
        ((1, None), (4, "ep2 optimizer")), ((2, "pp2"), (1, None)), slow((4, "fsdp"), (2, "pp2")),
        slow((4, "dp2 pp2 ep2"), (2, "fsdp")),
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


@pytest.mark.parametrize("words", ["fsdp", "ep2 fsdp", "ep2 replicated", "pp2"])
def test_a_sharded_model_speaks_as_a_whole_one(words):
    model = new_model(made()).eval()
    with torch.inference_mode():
        expected = model(torch.arange(5)[None] + 3).logits
    for rank, found in enumerate(on_ranks(2, scores_in_use, made(), words, 2)):
        if rank and words == "pp2":
            assert found is None
            continue
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
        ("pp2 fsdp", 2, r"pp2 and fsdp are not trained together: .*; take optimizer or replicated"),
        ("pp4", 4, r"4 pipeline stages cannot share 3 layers; there can be 1 to 3"),
        ("pp3 stages 1,2", 3, r"stages 1,2 are 2, the layout says pp3; leave one of them out"),
        (" stages 1,3", 2, r"stages 1,3 have 4 layers together; the model has 3"),
        (" stages 1-2", 2, r"stages '1-2' is not a list of numbers"),
    ],
)
def test_layouts_that_cannot_be_are_refused(words, ranks, said):
    words, _, layers = words.partition(" stages ")
    with pytest.raises(UsageError, match=said):
        layout_of(words, ranks, made(layers=3), layers or None)


def test_a_layout_is_completed_from_the_recipe():
    layout = layout_of("", 4, made())
    assert layout.words == ("dp4", "pp1", "ep1", "optimizer", "mb2", "none")
    assert layout_of("", 2, recipe(activation_checkpointing=True)).words[4:] == ("mb4", "full")
    assert [layout_of(words, 1, made()).sharding for words in ("", "fsdp")] == ["replicated", "fsdp"]
    assert layout_of("pp2", 4, recipe()).words == ("dp2", "pp2", "ep1", "optimizer", "mb2", "none")
    assert [layout_of("pp2", 2, made(layers=3), layers).layers for layers in (None, "1,2")] == [(2, 1), (1, 2)]
    assert layout_of("", 3, made(layers=3), "1,1,1").words[:2] == ("dp1", "pp3")


def test_lora_takes_no_pipeline():
    with pytest.raises(UsageError, match="LoRA leaves its base whole on every rank"):
        layout_of("pp2", 2, dataclasses.replace(recipe(), lora=LoraSettings()))
