"""Runs at their edges: measurements that are no number, full disks, two processes in one folder, damaged states."""

import errno
import math
import os

import pytest

from small_runs import TINY, job, write_tokens
from small_tokenizers import bpe
from yuanmoe.data.prepare.pack import pack_texts
from yuanmoe.errors import CheckpointError, ConfigError, ResourceError, TokenizerError, TrainingError
from yuanmoe.storage import run_folder
from yuanmoe.storage.run_folder import LOCK, METRICS, RunFolder, claimed_run, read_metrics
from yuanmoe.text.bpe import train_bpe
from yuanmoe.train.recipe.recipes import named
from yuanmoe.train.recipe.settings import override
from yuanmoe.train.run import train
from yuanmoe.train.state.checkpoint import newest, steps
from yuanmoe.train.steps.passes import Passes


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("tokens"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_held_out_loss_that_is_no_number_ends_the_run_and_saves_nothing(value, monkeypatch, data, tmp_path):
    monkeypatch.setattr(Passes, "measure", lambda *_: value)
    with pytest.raises(TrainingError, match=f"after step 10 the loss on the held-out text is {value}.*None was saved"):
        job(data, tmp_path / "run").go()
    assert steps(tmp_path / "run" / "checkpoints") == []
    assert len(read_metrics(tmp_path / "run")) == 9


def test_a_rate_that_blows_the_weights_up_is_said(data, tmp_path):
    settings = ("run.milestones=20", "optimizer.learning_rate=1e30", "schedule.warmup=0", "run.spike=none")
    with pytest.raises(TrainingError, match=r"step \d"):
        job(data, tmp_path / "run", *settings).go()


def test_two_processes_do_not_hold_one_run(data, tmp_path):
    folder = tmp_path / "run"
    with (
        claimed_run(folder),
        pytest.raises(TrainingError, match=f"is being trained by process {os.getpid()}; wait for it or end it"),
    ):
        job(data, folder).go()
    job(data, folder, "schedule.max_tokens=128").go()
    with claimed_run(folder), pytest.raises(TrainingError, match="is being trained by process"):
        train("nano", data=data, out=folder, settings=TINY, overwrite=True)
    assert steps(folder / "checkpoints") == [1, 2]


def test_a_lock_that_a_crash_left_holds_nobody(tmp_path):
    (tmp_path / LOCK).write_text("1\n")
    with claimed_run(tmp_path):
        assert (tmp_path / LOCK).read_text() == f"{os.getpid()}\n"


class FullFile:
    """A file on a disk that is full until it is not."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def close(self):
        self.file.close()


def test_lines_that_find_no_room_are_written_once_there_is_some(tmp_path):
    said = []
    with RunFolder(tmp_path, {}, say=said.append) as run:
        run.log({"step": 1})
        full = FullFile(run._files[METRICS], room=False)
        run._files[METRICS] = full
        run.log({"step": 2})
        run.log({"step": 3})
        assert read_metrics(tmp_path) == [{"step": 1}]
        full.room = True
        run.log({"step": 4})
    assert read_metrics(tmp_path) == [{"step": step} for step in (1, 2, 3, 4)]
    assert len(said) == 1
    assert "the disk is full: metrics.jsonl gets no lines for now" in said[0]


def test_curves_that_find_no_room_end_and_the_run_goes_on(monkeypatch, data, tmp_path):
    def no_room(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", no_room)
    made = job(data, tmp_path / "run")
    made.go()
    assert steps(tmp_path / "run" / "checkpoints") == [10, 20]
    assert sum("TensorBoard gets no more curves" in message for message in made.observer.messages) == 1


def test_a_disk_that_is_full_at_the_start_is_said_in_a_line(monkeypatch, tmp_path):
    def no_room(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder, "write_synced", no_room)
    with pytest.raises(ResourceError, match="the disk is full: No space left on device"):
        RunFolder(tmp_path / "run", {})


def damaged(path, name):
    content = bytearray((path / name).read_bytes())
    content[-1] ^= 1
    (path / name).write_bytes(content)


@pytest.mark.parametrize("name", ["training.safetensors", "model.safetensors"])
def test_a_damaged_newest_checkpoint_is_refused_and_the_whole_one_named(name, data, tmp_path):
    folder = tmp_path / "run"
    train("nano", data=data, out=folder, settings=TINY)
    places = folder / "checkpoints"
    damaged(places / "step-20", name)
    budget = [*TINY, "schedule.max_tokens=1408"]
    again = {"data": data, "out": folder, "settings": budget, "resume": True, "accept_changes": True}
    with pytest.raises(CheckpointError, match=rf"{name} is damaged: its sha256.*step-10 is whole: move .*step-20 away"):
        train("nano", **again)
    (places / "step-20").rename(folder / "aside")
    assert train("nano", **again)["steps"] == 22
    for step in steps(places):
        damaged(places / f"step-{step}", name)
    with pytest.raises(CheckpointError, match="no other checkpoint of this run is whole"):
        train("nano", **again | {"settings": [*TINY, "schedule.max_tokens=2560"]})


def test_a_state_with_a_nan_is_never_saved(data, tmp_path):
    made = job(data, tmp_path / "run")
    spoil = made.observer

    def stepped(progress, *_):
        if progress.step == 10:
            made.training.tensors()["exp_avg.model.norm.weight"][0] = math.nan

    spoil.stepped = stepped
    with pytest.raises(TrainingError, match=r"(not finite|nan).*The last good checkpoint is step-10"):
        made.go()
    assert steps(tmp_path / "run" / "checkpoints") == [10]


def test_a_seed_beyond_what_generators_take_is_refused():
    with pytest.raises(ConfigError, match=r"run.seed is 1,0.*; it must be at most 9,223,372,036,854,775,807"):
        override(named("nano"), ["run.seed=1e30"])


def test_text_of_another_tokenizer_is_refused_by_the_model_that_it_would_spoil(data, tmp_path):
    job(data, tmp_path / "base", "schedule.max_tokens=64").go()
    base = newest(tmp_path / "base" / "checkpoints")
    other = train_bpe(["other words of another language, which have other pieces\n" * 20], bpe().vocab_size)
    for part in ("train", "heldout"):
        pack_texts(["words and pieces\n" * 400], tmp_path / "foreign" / part, other)
    options = {"out": tmp_path / "run", "init": base}
    with pytest.raises(TokenizerError, match=r"has another tokenizer than the data.*data pack \.\.\. --tokenizer"):
        train("nano", data=tmp_path / "foreign", settings=TINY[8:], **options)
    assert train("nano", data=data, settings=(*TINY[7:], "schedule.max_tokens=64"), **options)["steps"] == 1
