"""The program under torchrun: a signal to all of its processes saves at one step, and what goes on may have fewer."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from small_runs import FIELDS_OF_TIME, arguments, write_tokens
from yuanmoe.checkpoint.write.verify import verify_checkpoint
from yuanmoe.storage.run_folder import read_metrics
from yuanmoe.train.state.checkpoint import newest, steps

ONE_LATE = """
import os, sys, time
from pathlib import Path
import torch
from yuanmoe.presets import preset
from yuanmoe.plan.cluster.layout import Layout
from yuanmoe.train.parallel import ranks
met, grouped = Path(sys.argv[1]), ranks.grouped
def late(*args):
    time.sleep(1)
    made = grouped(*args)
    met.touch()
    return made
if os.environ["RANK"] == sys.argv[2]:
    ranks.grouped = late
layout = Layout(data=2, stages=1, experts=1, sharding="replicated", micro_batch=1, checkpointing="none")
with ranks.joined(layout, preset("tiny"), torch.device("cpu")):
    assert met.exists(), "one goes ahead while the other is still connecting"
"""

LONG = ("schedule.max_tokens=128000", "run.prompts=[]", "run.milestones=1")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("tokens"))


def torchrun(ranks, args, log, program=("-m", "yuanmoe")):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    with log.open("w") as said:
        return subprocess.Popen([*launcher, *program, *args], stdout=said, stderr=subprocess.STDOUT)


def ranks_of(run):
    """The processes that torchrun started."""
    return [int(rank) for rank in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]


def until_steps(run, folder, count, log):
    """Waits until the run has logged so many."""
    deadline = time.monotonic() + 60
    while len(read_metrics(folder)) < count:
        assert run.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def test_sigterm_saves_on_all_ranks_and_one_process_goes_on(data, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    run = torchrun(2, arguments(data, folder, "--layout", "dp2 fsdp", settings=LONG), log)
    until_steps(run, folder, 5, log)
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) != 0
    done = len(read_metrics(folder))
    assert steps(folder / "checkpoints") == [done], log.read_text()
    assert log.read_text().count("stopped by a signal and saved") == 1
    last = f"schedule.max_tokens={64 * (done + 2)}"
    call = arguments(data, folder, "--resume", "--accept-changes", settings=(*LONG, last))
    found = subprocess.run([sys.executable, "-m", "yuanmoe", *call], capture_output=True, text=True, timeout=100)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout.splitlines()[-1])["steps"] == done + 2
    said = [line for line in found.stderr.splitlines() if line.startswith("changed: ")]
    assert said == [f"changed: schedule.max_tokens was 128000, is {64 * (done + 2)}"]


def test_a_pipeline_that_was_killed_ends_as_one_that_was_not(data, tmp_path):
    options = ("--layout", "pp2 mb1", "--stages", "1,2")
    settings = ("model.num_hidden_layers=3", "run.checkpoint_steps=3")
    whole, folder, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    assert torchrun(2, arguments(data, whole, *options, settings=settings), log).wait(60) == 0, log.read_text()
    run = torchrun(2, arguments(data, folder, *options, settings=settings), log)
    until_steps(run, folder, 7, log)
    for rank in ranks_of(run):
        os.kill(rank, signal.SIGKILL)
    assert run.wait(60) != 0
    assert 3 <= steps(folder / "checkpoints")[-1] < 20
    again = torchrun(2, arguments(data, folder, *options, "--resume", settings=settings), log)
    assert again.wait(60) == 0, log.read_text()
    assert "stages of 1,2 layers" in log.read_text()
    found, expected = newest(folder / "checkpoints"), newest(whole / "checkpoints")
    for name in ("model.safetensors", "training-00001-of-00002.safetensors", "training-00002-of-00002.safetensors"):
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    assert (folder / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    lines, others = read_metrics(folder), read_metrics(whole)
    assert [untimed(line) for line in lines] == [untimed(line) for line in others]
    assert len(lines[-1]["balance"]) == 3


@pytest.mark.parametrize("words", ["pp2 mb1", pytest.param("optimizer", marks=pytest.mark.slow)])
def test_where_one_rank_dies_the_other_says_so_and_the_last_checkpoint_is_whole(words, data, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    settings = (*LONG, "run.checkpoint_steps=40")
    run = torchrun(2, arguments(data, folder, "--layout", words, settings=settings), log)
    until_steps(run, folder, 45, log)
    os.kill(ranks_of(run)[1], signal.SIGKILL)
    assert run.wait(60) != 0
    said = log.read_text()
    assert said.count("error: another process of this run has ended or does not answer") == 1, said
    assert "[rank0]: Traceback" not in said
    assert steps(folder / "checkpoints") == [40]
    verify_checkpoint(newest(folder / "checkpoints"))


def test_what_all_ranks_refuse_is_said_once(data, tmp_path):
    log = tmp_path / "log"
    run = torchrun(2, arguments(data, tmp_path / "run", "--layout", "zero1"), log)
    assert run.wait(60) != 0
    assert log.read_text().count("error: ") == 1, log.read_text()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("slow", [0, 1])
def test_no_rank_goes_ahead_while_another_connects(slow, tmp_path):
    """One that refused its call would end, and the other would report a broken connection instead."""
    script, log = tmp_path / "one_late.py", tmp_path / "log"
    script.write_text(ONE_LATE)
    assert torchrun(2, [str(tmp_path / "met"), str(slow)], log, [str(script)]).wait(60) == 0, log.read_text()


def untimed(line):
    return {name: value for name, value in line.items() if name not in FIELDS_OF_TIME}


def test_a_layout_for_other_processes_is_refused(data, tmp_path):
    call = arguments(data, tmp_path / "run", "--layout", "dp2")
    found = subprocess.run([sys.executable, "-m", "yuanmoe", *call], capture_output=True, text=True, timeout=60)
    assert found.returncode == 2
    assert "needs 2 processes, there are 1; start them with: torchrun --nproc-per-node 2" in found.stderr
    assert not (tmp_path / "run").exists()
