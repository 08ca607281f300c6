"""Training runs that are killed, stopped, spoiled or out of room: nothing is lost, and what goes on is the same run."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time

import pytest
from safetensors.torch import load_file

from small_runs import FIELDS_OF_TIME, arguments, call, write_tokens
from small_tokenizers import bpe
from yuanmoe.data.prepare.pack import pack_texts
from yuanmoe.storage.run_folder import ENVIRONMENT, SAMPLES, read_lines, read_metrics
from yuanmoe.train.state.checkpoint import FACTS, steps
from yuanmoe.train.state.stored import TENSORS

OFTEN = ("run.checkpoint_steps=3",)
SLOW_S = 0.02


@pytest.fixture(scope="module")
def processes():
    """Children that have torch already: each starts in a moment, and can be killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["small_runs", "yuanmoe.cli.train.command", "torch.utils.tensorboard", "torch._dynamo"]
    )
    return context


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def whole(processes, data, tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    code, said = finished(start(processes, data, folder, settings=OFTEN), folder)
    assert code == 0, said
    return folder


def start(processes, data, folder, *options, settings=(), slow_s=0.0):
    folder.parent.mkdir(parents=True, exist_ok=True)
    args = arguments(data, folder, *options, settings=settings)
    child = processes.Process(target=call, args=(args, log_of(folder), slow_s))
    child.start()
    return child


def log_of(folder):
    return folder.parent / (folder.name + ".log")


def finished(child, folder):
    """The exit code and what was said."""
    child.join(60)
    assert child.exitcode is not None
    return child.exitcode, log_of(folder).read_text()


def wait_for(condition, child):
    deadline = time.monotonic() + 60
    while not condition():
        assert child.is_alive(), "it ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.001)


def steps_logged(folder):
    return len(read_metrics(folder))


def timeless(folder):
    return [{key: value for key, value in line.items() if key not in FIELDS_OF_TIME} for line in read_metrics(folder)]


def assert_same_run(one, other):
    """The same weights, moments, metrics and samples, bit for bit."""
    assert timeless(one) == timeless(other)
    assert read_lines(one / SAMPLES) == read_lines(other / SAMPLES)
    last = steps(one / "checkpoints")[-1]
    for name in ("model.safetensors", TENSORS):
        first, second = (load_file(folder / "checkpoints" / f"step-{last}" / name) for folder in (one, other))
        assert first.keys() == second.keys()
        for key, tensor in first.items():
            assert tensor.equal(second[key]), key


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_killed_again_and_again_ends_as_one_that_was_not(seed, processes, data, whole, tmp_path):
    chance, folder, options = random.Random(seed), tmp_path / "run", ()
    for _ in range(3):
        before = steps_logged(folder)
        saved = steps(folder / "checkpoints") if (folder / "checkpoints").is_dir() else []
        target = min(19, (saved[-1] if saved else 0) + chance.randint(1, 7))
        child = start(processes, data, folder, *options, settings=OFTEN, slow_s=SLOW_S)
        wait_for(lambda before=before, target=target: steps_logged(folder) == target or before > target, child)
        time.sleep(chance.random() * SLOW_S)
        child.kill()
        child.join()
        options = ("--resume",) if steps(folder / "checkpoints") else ()
    code, said = finished(start(processes, data, folder, *options, settings=OFTEN), folder)
    assert code == 0, said
    assert_same_run(folder, whole)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(processes, data, whole, tmp_path):
    folder = tmp_path / "run"
    child = start(processes, data, folder, settings=OFTEN, slow_s=SLOW_S)
    places = folder / "checkpoints"
    wait_for(lambda: any(path.name != "step-3.partial" for path in places.glob("*.partial")), child)
    child.kill()
    child.join()
    assert steps(places)
    code, said = finished(start(processes, data, folder, "--resume", settings=OFTEN), folder)
    assert code == 0, said
    assert not list(places.glob("*.partial"))
    assert_same_run(folder, whole)
    assert [run["step"] for run in json.loads((folder / ENVIRONMENT).read_text())["resumed"]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first(number, processes, data, whole, tmp_path):
    folder = tmp_path / "run"
    child = start(processes, data, folder, settings=OFTEN, slow_s=SLOW_S)
    wait_for(lambda: steps_logged(folder) >= 7, child)
    os.kill(child.pid, number)
    code, said = finished(child, folder)
    assert code == 128 + number
    done = steps_logged(folder)
    assert done < 20
    assert steps(folder / "checkpoints")[-1] == done
    assert "stopped by a signal and saved; the same command with --resume goes on" in said
    assert finished(start(processes, data, folder, "--resume", settings=OFTEN), folder)[0] == 0
    assert_same_run(folder, whole)


def test_the_newest_and_the_best_are_kept(whole):
    lines = read_metrics(whole)
    best = min((line for line in lines if "heldout_loss" in line), key=lambda line: line["heldout_loss"])["step"]
    assert steps(whole / "checkpoints") == sorted({18, 20, best})
    assert {path.name for path in (whole / "checkpoints").iterdir()} == {
        f"step-{step}" for step in steps(whole / "checkpoints")
    }


def test_a_finished_run_has_nothing_left_to_do_and_a_new_one_does_not_replace_it(processes, data, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    code, said = finished(start(processes, data, folder, settings=OFTEN), folder)
    assert code == 2
    assert "holds a run of 20 steps: --resume goes on with it, --overwrite starts over" in said
    code, said = finished(start(processes, data, folder, "--resume", settings=OFTEN), folder)
    assert code == 2
    assert "has used up its budget" in said
    assert finished(start(processes, data, folder, "--overwrite", settings=OFTEN), folder)[0] == 0
    assert_same_run(folder, whole)


def test_changed_settings_are_named_and_need_a_flag(processes, data, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    changed = (*OFTEN, "schedule.max_tokens=1408", "optimizer.weight_decay=0.2")
    code, said = finished(start(processes, data, folder, "--resume", settings=changed), folder)
    assert code == 2
    assert "optimizer.weight_decay was 0.1, is 0.2; schedule.max_tokens was 1280, is 1408" in said
    assert "--accept-changes" in said
    assert timeless(folder) == timeless(whole)
    code, said = finished(start(processes, data, folder, "--resume", "--accept-changes", settings=changed), folder)
    assert code == 0, said
    assert steps_logged(folder) == 22
    changed = (*changed, "model.hidden_size=64", "schedule.max_tokens=2000")
    code, said = finished(start(processes, data, folder, "--resume", "--accept-changes", settings=changed), folder)
    assert code == 2
    assert "model.hidden_size was 32, is 64" in said
    assert "do not fit the recipe's model, whose sizes differ" in said


def test_other_text_is_named(processes, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    other = write_tokens(tmp_path / "other")
    pack_texts(["another text\n" * 400], other / "train", bpe(), overwrite=True)
    code, said = finished(start(processes, other, folder, "--resume", settings=OFTEN), folder)
    assert code == 2
    assert "text.train was" in said


def test_a_run_without_a_checkpoint_cannot_go_on(processes, data, tmp_path):
    folder = tmp_path / "run"
    code, said = finished(start(processes, data, folder, "--resume"), folder)
    assert code == 1
    assert "holds no checkpoint to go on from; start the run without --resume" in said


def test_what_a_checkpoint_says_of_itself(whole):
    facts = json.loads((whole / "checkpoints" / "step-20" / FACTS).read_text())
    assert facts["step"] == 20
    assert facts["recipe"]["optimizer"]["learning_rate"] == 4e-3
    assert len(facts["recent"]) == 20
