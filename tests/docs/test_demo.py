"""`yuanmoe demo` as people run it; with `--train` every stage, a second run that reuses them; the commands it names."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest

import yuanmoe
from yuanmoe.checkpoint.open import open_checkpoint
from yuanmoe.storage.run_folder import read_metrics

SMALL = ("--corpus-size", "400KB")
STAGES = ["corpus", "tokenizer", "tokens", "model"]


def run(*command, cwd):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=True, timeout=300)


def demo(folder, *options):
    """What people saw, and the JSON of the last line."""
    done = run(sys.executable, "-m", "yuanmoe", "demo", "--train", *SMALL, *options, cwd=folder)
    return done.stderr, json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, *demo(folder, "--seconds", "3")


def test_a_demo_goes_through_every_stage(first):
    folder, seen, result = first
    assert re.findall(rf"^  ({'|'.join(STAGES)}) .*\((?:kept|[\d.]+ s)\)$", seen, re.MULTILINE) == STAGES
    assert result["reused"] == []
    assert result["corpus"]["text_bytes"] <= 400_000
    assert result["tokens"]["train"]["vocab_size"] == result["tokenizer"]["vocab_size"] <= 2048
    trained = result["model"]
    assert 3 <= trained["seconds"] < 60
    assert not trained["interrupted"]
    assert 0 < trained["heldout_bits_per_byte"] < 4
    assert trained["flops_per_s"] > 0
    lines = read_metrics(folder / "demo" / "run")
    assert lines[-1]["step"] == trained["steps"] == len(lines)
    assert lines[-1]["heldout_bits_per_byte"] > 0


def test_the_model_is_saved_in_the_official_layout(first):
    folder, _, _ = first
    checkpoint = open_checkpoint(folder / "demo" / "model")
    assert checkpoint.format == "official"
    assert checkpoint.config.num_experts == 32
    text = yuanmoe.load(folder / "demo" / "model").generate("def ", max_new_tokens=4).text
    assert text


def test_completions_show_their_experts(first):
    _, seen, result = first
    assert len(result["completions"]) == 3
    for completion in result["completions"]:
        assert completion["prompt"] in seen
        counts = [sum(layer.values()) for layer in completion["tokens_by_expert"]]
        assert len(set(counts)) == 1
        assert counts[0] > 0
    assert seen.count("\nlayer ") == 4 + len(counts), "the shipped model has four layers"


def test_the_shipped_model_answers_before_anything_is_made(first):
    _, seen, result = first
    assert [shipped["prompt"] for shipped in result["shipped"]] == [one["prompt"] for one in result["completions"]]
    before = seen[: seen.index("  corpus ")]
    for shipped in result["shipped"]:
        assert shipped["text"].strip().splitlines()[0] in before


def test_a_second_run_reuses_everything_and_a_changed_setting_only_what_is_before_it(first):
    folder, _, result = first
    again = demo(folder, "--seconds", "3")[1]
    assert again == result | {"reused": STAGES}
    changed = demo(folder, "--seconds", "1")[1]
    assert changed["reused"] == STAGES[:3]
    assert changed["tokens"] == result["tokens"]


def test_the_commands_it_names_work(first):
    folder, seen, _ = first
    commands = [shlex.split(line) for line in seen.split("Next\n")[1].splitlines()]
    assert [command[3] for command in commands] == ["generate", "inspect", "plan"]
    for interpreter, *arguments in commands:
        assert interpreter == os.path.basename(sys.executable)
        assert run(sys.executable, *arguments, cwd=folder).stdout
    assert (folder / "demo" / "experts.html").is_file()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The demo alone: no training."""
    folder = tmp_path_factory.mktemp("plain")
    done = run(sys.executable, "-m", "yuanmoe", "demo", cwd=folder)
    return folder, done.stderr, json.loads(done.stdout)


def test_the_demo_alone_answers_and_leaves_nothing(plain):
    folder, seen, result = plain
    assert [each["prompt"] for each in result["shipped"]]
    assert all(each["text"].strip().splitlines()[0] in seen for each in result["shipped"])
    assert result.keys() == {"command", "shipped"}
    assert list(folder.iterdir()) == []


def test_the_demo_alone_names_three_commands_that_work(plain, tmp_path):
    commands = [shlex.split(line) for line in plain[1].split("Next\n")[1].splitlines()]
    assert [command[3] for command in commands] == ["generate", "inspect", "demo"]
    assert commands[-1][3:] == ["demo", "--train"]
    for _, *arguments in commands[:-1]:
        assert run(sys.executable, *arguments, cwd=tmp_path).stdout
    assert (tmp_path / "experts.html").is_file()


def test_options_of_the_training_need_it(tmp_path):
    command = (sys.executable, "-m", "yuanmoe", "demo", "--seconds", "5")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--seconds is about training a model; add --train" in done.stderr
