"""The program under torchrun: a signal to all of its processes saves at one step, and what goes on may have fewer."""

import json
import signal
import subprocess
import sys
import time

import pytest

from small_runs import arguments, write_tokens
from yuanmoe.runs import read_metrics
from yuanmoe.train.checkpoint import steps

LONG = ("schedule.max_tokens=128000", "run.prompts=[]", "run.milestones=1")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("tokens"))


def torchrun(ranks, args, log):
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    with log.open("w") as said:
        return subprocess.Popen([*program, "-m", "yuanmoe", *args], stdout=said, stderr=subprocess.STDOUT)


def test_sigterm_saves_on_all_ranks_and_one_process_goes_on(data, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    run = torchrun(2, arguments(data, folder, "--layout", "dp2 fsdp", settings=LONG), log)
    deadline = time.monotonic() + 60
    while len(read_metrics(folder)) < 5:
        assert run.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
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


def test_a_layout_for_other_processes_is_refused(data, tmp_path):
    call = arguments(data, tmp_path / "run", "--layout", "dp2")
    found = subprocess.run([sys.executable, "-m", "yuanmoe", *call], capture_output=True, text=True, timeout=60)
    assert found.returncode == 2
    assert "needs 2 processes, there are 1; start them with: torchrun --nproc-per-node 2" in found.stderr
    assert not (tmp_path / "run").exists()
