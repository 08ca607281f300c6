"""Run folders: everything that was asked for and measured, readable even after a kill."""

import json
import subprocess

import pytest

from yuanmoe.storage import run_folder as runs
from yuanmoe.storage.run_folder import ENVIRONMENT, METRICS, RECIPE, RunFolder, git_commit, read_metrics


def test_a_run_folder_says_what_was_asked_where_and_what_came_of_it(tmp_path):
    lines = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25}]
    with RunFolder(tmp_path / "runs" / "one", {"batch_size": 3}) as run:
        for line in lines:
            run.log(line)
            assert read_metrics(run.path)[-1] == line
    assert read_metrics(run.path) == lines
    assert json.loads((run.path / RECIPE).read_text()) == {"batch_size": 3}
    environment = json.loads((run.path / ENVIRONMENT).read_text())
    assert {"started", "command", "python", "packages", "commit", "cores"} <= environment.keys()
    assert environment["packages"]["torch"]


def test_a_new_run_replaces_the_old_one(tmp_path):
    for loss in (1.0, 2.0):
        with RunFolder(tmp_path, {"loss": loss}) as run:
            run.log({"loss": loss})
    assert read_metrics(tmp_path) == [{"loss": 2.0}]


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    (tmp_path / METRICS).write_text('{"step": 1}\n{"st')
    assert read_metrics(tmp_path) == [{"step": 1}]


def test_numbers_that_are_none_are_refused(tmp_path):
    with RunFolder(tmp_path, {}) as run, pytest.raises(ValueError, match="Out of range float"):
        run.log({"loss": float("nan")})


def test_the_commit_is_that_of_the_checkout_a_file_belongs_to(tmp_path):
    def git(*arguments):
        settings = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main")
        subprocess.run(["git", "-C", tmp_path, *settings, *arguments], check=True, capture_output=True)

    tracked, ignored = tmp_path / "tracked.py", tmp_path / "installed.py"
    tracked.write_text("1")
    ignored.write_text("1")
    assert git_commit(tracked) is None
    git("init")
    git("add", "tracked.py")
    git("commit", "-m", "first")
    commit = git_commit(tracked)
    assert commit is not None
    assert len(commit) == 40
    assert git_commit(ignored) is None
    tracked.write_text("2")
    assert git_commit(tracked) == commit + "+"


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runs.environment()["commit"] is None
