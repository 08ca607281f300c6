"""Steps that must not be taken and checkpoints that cannot be written: said with the numbers, and nothing is lost."""

import dataclasses
import errno
import json
import math

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from small_runs import BATCH, LENGTH, TINY, arguments, batches, job, recipe, training, write_tokens
from small_tokenizers import bpe
from yuanmoe.checkpoint.formats.native_config import Origin
from yuanmoe.checkpoint.write import writer
from yuanmoe.cli import main
from yuanmoe.cli.train import view as training_view
from yuanmoe.data.prepare.pack import pack_texts
from yuanmoe.data.sets.megatron import write_megatron
from yuanmoe.data.sets.packed import PackedTokens
from yuanmoe.errors import CheckpointError, DataError, ResourceError, TokenizerError, TrainingError
from yuanmoe.presets import preset
from yuanmoe.storage.run_folder import read_metrics
from yuanmoe.train.recipe.recipes import named
from yuanmoe.train.recipe.settings import override
from yuanmoe.train.start.data import open_data
from yuanmoe.train.state.checkpoint import Checkpoints, newest, read_facts, snapshot, steps, surplus
from yuanmoe.train.state.stored import Stored
from yuanmoe.train.steps import guard
from yuanmoe.train.steps.meter import read
from yuanmoe.train.steps.passes import Passes

BAD_STEP = 7


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("tokens"))


def seen(run):
    return " ".join(run.observer.messages)


# --- losses that must not be learned from -----------------------------------------------------------------------------


def spoil(monkeypatch, **fields):
    """The step after `BAD_STEP` steps sees this loss."""
    learn = Passes.learn
    calls = []

    def spoiled(*args):
        calls.append(args)
        learned = learn(*args)
        return dataclasses.replace(learned, **fields) if len(calls) == BAD_STEP + 1 else learned

    monkeypatch.setattr(Passes, "learn", spoiled)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_with_the_state_before_it(value, monkeypatch, data, tmp_path):
    spoil(monkeypatch, loss=torch.tensor(value))
    folder = tmp_path / "run"
    with pytest.raises(TrainingError) as caught:
        job(data, folder).go()
    said = str(caught.value)
    assert f"step 8: the loss is {value}; gradient norm " in said
    assert "batch 7, where the windows with the highest loss are " in said
    assert f"The state before it is saved in {folder}/checkpoints/step-7; --resume goes on from there" in said
    assert len(read_metrics(folder)) == BAD_STEP
    monkeypatch.undo()
    again = job(data, folder, resumed_from=newest(folder / "checkpoints"))
    whole = job(data, tmp_path / "whole")
    again.job.model.load_state_dict(weights(folder))
    again.go()
    whole.go()
    for name, tensor in whole.job.model.state_dict().items():
        assert torch.equal(again.job.model.state_dict()[name], tensor), name


def weights(folder):
    return load_file(newest(folder / "checkpoints") / "model.safetensors")


def test_a_gradient_that_is_not_finite_stops_the_run_and_changes_nothing():
    made = training(recipe())
    made.advance()
    before = {name: parameter.clone() for name, parameter in made.model.named_parameters()}
    made.model.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingError, match=r"step 2: the gradient is not finite; gradient norm (inf|nan); batch 1"):
        made.advance()
    assert made.step == 1
    for name, parameter in made.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_a_spike_is_told_from_noise():
    calm = [(3.0, 1), (3.2, 1)] * 8
    assert "the loss is 5.300, more than 2.0 above the mean of the last steps, 3.100" in guard.fault(5.3, 1, calm, 2.0)
    assert not guard.fault(5.0, 1.0, calm, 2.0)
    assert not guard.fault(9.0, 1.0, calm[: guard.CALM_STEPS - 1], 2.0)
    assert not guard.fault(9.0, 1.0, calm, None)


def test_the_windows_to_blame_are_named_worst_first():
    said = str(guard.failure(9, 8, "the loss is nan", 2.5, [1.0, 7.0, math.nan, 2.0, 3.0, 0.5]))
    assert "2 (loss nan), 1 (loss 7.000), 4 (loss 3.000), 3 (loss 2.000)." in said


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_state_read_back_is_the_state(tmp_path):
    made = training(recipe(dtype="bfloat16", model=preset("tiny", vocab_size=64, router_bias=True)))
    for _ in range(3):
        made.advance()
    with Checkpoints(tmp_path, keep_last=1) as kept:
        kept.save(snapshot(made.model, made.tensors(), made.facts(), Origin()))
        place = kept.finish()
    tensors = Stored(place)
    assert {name.partition(".")[0] for name in tensors} == {"master", "exp_avg", "exp_avg_sq", "router_bias"}
    for name, tensor in made.tensors().items():
        assert torch.equal(tensors[name], tensor), name
    again = training(made.recipe)
    again.model.load_state_dict(made.model.state_dict())
    again.load(tensors, read_facts(place))
    for _ in range(2):
        expected, found = made.advance(), again.advance()
        assert (found.loss, found.gradient_norm, found.load) == (expected.loss, expected.gradient_norm, expected.load)
    for one, other in zip(made.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_training_goes_on_while_a_snapshot_is_written(tmp_path):
    made = training(recipe())
    made.advance()
    taken = snapshot(made.model, made.tensors(), made.facts(), Origin())
    before = made.model.state_dict()["model.norm.weight"].clone()
    made.advance()
    assert torch.equal(taken.weights["model.norm.weight"], before)
    assert not torch.equal(made.model.state_dict()["model.norm.weight"], before)
    assert taken.step == 1


def full_disk(monkeypatch, *bad):
    """Writing these files by their number, from 0, finds no room."""
    write, calls = writer.write_safetensors, []

    def limited(path, *args, **options):
        calls.append(path)
        if len(calls) - 1 in bad:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, *args, **options)

    monkeypatch.setattr(writer, "write_safetensors", limited)


def test_a_full_disk_keeps_the_checkpoint_before_and_says_so(monkeypatch, data, tmp_path):
    full_disk(monkeypatch, 3)
    folder = tmp_path / "run"
    made = job(data, folder, "run.checkpoint_steps=4", "run.keep_last=9")
    made.go()
    # Two files each: the second of step 8 had no room.
    assert steps(folder / "checkpoints") == [4, 10, 12, 16, 20]
    assert not list((folder / "checkpoints").glob("*.partial"))
    said = seen(made)
    assert "a checkpoint was not written: the disk is full: No space left on device" in said
    assert "the last good one is step-4. Training goes on and tries again at the next" in said


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(monkeypatch, data, tmp_path):
    full_disk(monkeypatch, *range(2, 40))
    with pytest.raises(ResourceError, match="the disk is full: No space left on device"):
        job(data, tmp_path / "run").go()
    assert steps(tmp_path / "run" / "checkpoints") == [10]
    assert len(read_metrics(tmp_path / "run")) == 20


def test_what_a_killed_run_left_is_cleared_away(tmp_path):
    for name in ("step-4.partial", "step-2.dropped", "step-3", "notes"):
        (tmp_path / name).mkdir()
    with Checkpoints(tmp_path, keep_last=1):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step-3"]


def test_the_newest_and_the_best_stay():
    facts = {step: {"heldout_loss": loss} for step, loss in {2: 3.0, 4: 1.0, 6: None, 8: 2.0, 10: None}.items()}
    assert surplus(facts, 2) == [2, 6]
    assert surplus({2: {}, 4: {}}, 1) == [2]
    assert surplus({}, 1) == []


def test_a_checkpoint_that_no_training_wrote_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no training.json: no training run wrote it.*--init"):
        read_facts(tmp_path)


# --- data -------------------------------------------------------------------------------------------------------------


def opened(made, *places, **others):
    return open_data([(1.0, place) for place in places], made, **others)


def test_data_that_cannot_be_trained_on_is_refused(data, tmp_path):
    made = override(named("nano"), TINY)
    with pytest.raises(DataError, match=r"is no dataset.*make one with yuanmoe data pack"):
        opened(made, tmp_path)
    with pytest.raises(TokenizerError, match="the model's vocabulary ends at 99"):
        opened(override(made, ["model.vocab_size=100"]), data)
    other = write_tokens(tmp_path / "other")
    manifest = json.loads((other / "train" / "manifest.json").read_text())
    (other / "train" / "manifest.json").write_text(json.dumps(manifest | {"tokenizer_sha256": "0" * 64}))
    with pytest.raises(DataError, match="was packed with another tokenizer"):
        opened(made, other)
    pack_texts(["short"], other / "train", bpe(), overwrite=True)
    with pytest.raises(DataError, match="has 6 tokens, a window takes 17"):
        opened(made, other)
    with pytest.raises(DataError, match="the weights of 1 sources sum to 0"):
        open_data([(0.0, data)], made)


def test_a_dataset_alone_is_not_measured_unless_a_text_for_it_is_named(data):
    made = override(named("nano"), TINY)
    assert opened(made, data / "train").heldout is None
    alone, named_apart = opened(made, data), opened(made, data / "train", heldout=[data / "heldout"])
    assert (named_apart.heldout.ids == alone.heldout.ids).all()
    assert named_apart.identity == alone.identity


def test_tokens_that_name_no_tokenizer_need_one(data, tmp_path):
    made = override(named("nano"), TINY)
    write_megatron(PackedTokens(data / "train"), tmp_path / "pair", vocab_size=512)
    with pytest.raises(DataError, match="does not say which tokenizer made it; name it with --tokenizer"):
        opened(made, tmp_path / "pair")
    given = opened(made, tmp_path / "pair", tokenizer=data / "train")
    assert (given.batch(3).ids == opened(made, data).batch(3).ids).all()
    assert (given.bytes_per_token, given.tokenizer) == (None, data / "train")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "nano"], "there is nothing to train on: name a folder of packed tokens with --data"),
        (["train", "nan"], "unknown recipe 'nan'; did you mean nano? Recipes: nano, small"),
        (["train", "nano", "--set", "data.batchsize=1"], "did you mean data.batch_size?"),
        (["train", "nano", "--init", "nowhere"], "nowhere does not exist"),
        (["train", "nano", "--data", "nowhere"], "nowhere is no dataset"),
        (["train", "nano", "--data", "nowhere", "--device", "foo"], "there is no device 'foo' for torch"),
        (["train", "nano", "--data", "3=a", "--data", "b"], "b has no weight, others have; write --data WEIGHT=PATH"),
        (["train", "nano", "--data", "x=a"], "'x' is no weight for a; write --data WEIGHT=PATH, such as 25.2=a"),
    ],
)
def test_wrong_calls_are_said_in_a_line(args, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["yuanmoe", *args])
    with pytest.raises(SystemExit):
        main.main()
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_model_beyond_this_machine_is_refused_before_it_is_made(monkeypatch, capsys, data, tmp_path):
    huge = arguments(data, tmp_path / "run", settings=("model.num_experts=1024", "model.moe_intermediate_size=900000"))
    monkeypatch.setattr("sys.argv", ["yuanmoe", *huge])
    with pytest.raises(SystemExit):
        main.main()
    assert "for weights, gradients and moments" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_the_display_says_what_ctrl_c_does():
    console = Console(width=120)
    view = training_view.TrainingView(console=console, peak_flops=1.0, hint="Ctrl-C saves and stops")
    progress = next(iter(training(recipe())))
    reading = read([progress], recipe())
    with console.capture() as captured:
        console.print(view._panel(progress, reading))
    assert "Ctrl-C saves and stops" in captured.get()


def test_batches_are_functions_of_their_numbers():
    made = recipe()
    assert (batches(made)(5).ids == batches(made)(5).ids).all()
    assert batches(made)(5).ids.shape == (BATCH, LENGTH + 1)
