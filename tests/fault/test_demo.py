"""A demo that is interrupted, killed or asked for the impossible: what is finished stays, and the rest is said."""

import json
import os
import signal
import subprocess
import sys

import pytest

from yuanmoe.cli.demo.done import RECORD

ENDLESS = ("--seconds", "1000")
TRAINING = " tokens, loss "
"""In the first line about the training."""


def start(folder, *options):
    command = [sys.executable, "-m", "yuanmoe", "demo", "--train", "--corpus-size", "400KB", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def started_training(folder, *options):
    process = start(folder, *options)
    assert process.stderr is not None
    for line in process.stderr:
        if TRAINING in line:
            return process
    raise AssertionError("no training")


def test_ctrl_c_ends_the_training_and_the_demo_goes_on(tmp_path):
    with started_training(tmp_path, *ENDLESS) as process:
        process.send_signal(signal.SIGINT)
        out, seen = process.communicate(timeout=120)
    result = json.loads(out.splitlines()[-1])
    assert process.returncode == 0
    assert result["model"]["interrupted"]
    assert len(result["completions"]) == 3
    assert "ended early, --fresh trains it in full" in seen
    out, seen = start(tmp_path, *ENDLESS).communicate(timeout=120)
    assert json.loads(out)["reused"] == ["corpus", "tokenizer", "tokens", "model"]
    assert "ended early" in seen


@pytest.mark.slow  # A killed training and stages that are reused have shorter tests of their own.
def test_a_killed_demo_goes_on_from_its_finished_stages(tmp_path):
    with started_training(tmp_path, *ENDLESS) as process:
        process.kill()
    assert not (tmp_path / "demo" / "model").exists()
    assert json.loads((tmp_path / "demo" / RECORD).read_text()).keys() == {"corpus", "tokenizer", "tokens"}
    out, _ = start(tmp_path, "--seconds", "1").communicate(timeout=120)
    assert json.loads(out)["reused"] == ["corpus", "tokenizer", "tokens"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--seconds", "inf"], 1, "schedule.max_seconds is inf; it must be a number above 0"),
        (["--corpus-size", "much"], 2, "size 'much' is not a number with a unit"),
        (["--corpus-size", "1B"], 1, r"the standard library gave 0 documents; training needs one"),
        (["--out", "file"], 1, "cannot write file"),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path, options, code, message):
    (tmp_path / "file").write_text("")
    process = start(tmp_path, *options)
    _, seen = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"error: {message}" in seen
    assert "Traceback" not in seen
