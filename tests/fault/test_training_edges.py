"""Runs at their edges: measurements that are no number, full disks, two processes in one folder, damaged states."""

import math

import pytest

from small_runs import job, write_tokens
from yuanmoe.cli.train.job import run_training
from yuanmoe.errors import TrainingError
from yuanmoe.storage.run_folder import read_metrics
from yuanmoe.train.state.checkpoint import steps
from yuanmoe.train.steps.passes import Passes


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("tokens"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_held_out_loss_that_is_no_number_ends_the_run_and_saves_nothing(value, monkeypatch, data, tmp_path):
    monkeypatch.setattr(Passes, "measure", lambda *_: value)
    with pytest.raises(TrainingError, match=f"after step 10 the loss on the held-out text is {value}.*None was saved"):
        run_training(job(data, tmp_path / "run"))
    assert steps(tmp_path / "run" / "checkpoints") == []
    assert len(read_metrics(tmp_path / "run")) == 9


def test_a_rate_that_blows_the_weights_up_is_said(data, tmp_path):
    settings = ("run.milestones=20", "optimizer.learning_rate=1e30", "schedule.warmup=0", "run.spike=none")
    with pytest.raises(TrainingError, match=r"step \d"):
        run_training(job(data, tmp_path / "run", *settings))
