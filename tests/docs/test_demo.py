"""`yuanmoe demo` as a user runs it, in seconds instead of minutes: every stage, a second run, Ctrl-C."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

SMALL = ("--corpus-size", "300kB")


def start(out: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "yuanmoe", "demo", "--out", str(out), *SMALL, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(out: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    process = start(out, *arguments)
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    return stderr, json.loads(stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, *run(out, "--seconds", "3")


def test_a_first_run_does_every_stage_and_says_what_to_try(made: tuple[Path, str, dict[str, Any]]) -> None:
    out, said, result = made
    assert result["reused"] == []
    assert result["model"]["tokens"] > 0
    assert 0 < result["model"]["heldout_bits_per_byte"] < 8
    assert len(result["completions"]) == 3
    config = json.loads((out / "model" / "config.json").read_text())
    assert config["model_type"] == "yuan"
    assert config["moe_config"]["moe_num_experts"] == 32
    assert (out / "model" / "tokenizer.json").is_file()
    commands = said.split("Next")[1]
    assert re.findall(r"yuanmoe (\w+)", commands) == ["generate", "inspect", "plan"]


def test_a_second_run_reuses_what_is_there(made: tuple[Path, str, dict[str, Any]]) -> None:
    out, _, first = made
    _, second = run(out, "--seconds", "3")
    assert second["reused"] == ["corpus", "tokenizer", "tokens", "model"]
    assert second["completions"] == first["completions"]


def test_a_changed_setting_redoes_what_depends_on_it(made: tuple[Path, str, dict[str, Any]]) -> None:
    out, *_ = made
    _, again = run(out, "--seconds", "2")
    assert again["reused"] == ["corpus", "tokenizer", "tokens"]


def test_ctrl_c_ends_training_early_and_goes_on(tmp_path: Path) -> None:
    process = start(tmp_path / "out", "--seconds", "300")
    metrics = tmp_path / "out" / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "training did not begin"
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    result = json.loads(stdout.splitlines()[-1])
    assert result["model"]["interrupted"]
    assert len(result["completions"]) == 3
