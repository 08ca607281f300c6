"""The shipped model's name in every option that takes a model or a tokenizer."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from yuanmoe.checkpoint.open import open_checkpoint, read_config
from yuanmoe.cli.main import COMMANDS, load_command
from yuanmoe.shipped import small_folder
from yuanmoe.text.tokenizer import load_tokenizer

TAKES_A_MODEL = {
    ("plan", "model"),
    ("doctor", "model"),
    ("convert", "src"),
    ("verify", "path"),
    ("quantize", "src"),
    ("generate", "model"),
    ("chat", "model"),
    ("serve", "model"),
    ("inspect", "model"),
    ("data pack", "tokenizer"),
    ("data verify", "tokenizer"),
    ("data preview", "tokenizer"),
    ("bench decode", "model"),
    ("train", "init"),
    ("train", "tokenizer"),
    ("adapter merge", "model"),
}
READ_AS_TEXT = {("plan", "model"), ("doctor", "model")}
"""These take a preset's name too; `estimate.read_model` tells them apart."""
TEXT = "def add(first, second):\n    return first + second\n" * 40


def commands() -> dict[str, Any]:
    found = {}
    for name in COMMANDS:
        command = load_command(name)
        for inner, each in (getattr(command, "commands", None) or {"": command}).items():
            found[f"{name} {inner}".strip()] = each
    return found


def options() -> dict[tuple[str, str], Any]:
    return {(name, each.name): each for name, command in commands().items() for each in command.params}


NO_MODELS_HERE = {("data export", "src"), ("adapter export-peft", "base")}
"""A dataset, and a name that is written for PEFT to find."""


def test_the_table_is_complete():
    names = {"model", "tokenizer", "init", "base", "src"}
    about_models = {key for key in options() if key[1] in names} - NO_MODELS_HERE
    assert about_models | {("verify", "path")} == TAKES_A_MODEL


@pytest.mark.parametrize("key", sorted(TAKES_A_MODEL - READ_AS_TEXT), ids=" ".join)
def test_the_name_becomes_the_folder(key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert given(*key) == small_folder()
    (tmp_path / "small").mkdir()
    assert given(*key) == Path("small"), "a folder of that name comes first"


def given(name: str, option: str) -> Any:
    """What a command gets where `small` is given for that option."""
    words = ["small"] if option in {"src", "path"} else [f"--{option}", "small"]
    return commands()[name].make_context(name, words, resilient_parsing=True).params[option]


def test_functions_take_the_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("small").path == small_folder()
    assert read_config("small") == read_config(small_folder())
    assert load_tokenizer("small").sha256 == load_tokenizer(small_folder()).sha256


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    (folder / "text.py").write_text(TEXT)
    run(folder, "data", "pack", "text.py", "tokens", "--tokenizer", "small")
    return folder


def run(folder: Path, *arguments: str, code: int = 0) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "yuanmoe", *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120, input="hello\n"
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        "plan small --device h200",
        "verify small",
        "convert small copy",
        "generate x --model small --max-new-tokens 2",
        "chat --model small --max-new-tokens 2",
        "chat --max-new-tokens 2",
        "inspect --model small --text text.py --tokens 64",
        "data verify tokens --tokenizer small",
        "data preview tokens --tokenizer small",
        "bench decode --model small --contexts 4 --prompts 4 --runs 1 --no-peer",
        "train m32-lora --init small --show",
    ],
)
def test_commands_run_with_the_name(folder, arguments):
    assert run(folder, *arguments.split())


def test_the_shipped_model_is_adapted_by_its_name(folder):
    settings = ("data.sequence_length=32", "data.batch_size=1", "schedule.max_tokens=64")
    changes = [word for setting in settings for word in ("--set", setting)]
    out = run(folder, "train", "m32-lora", "--data", "tokens", "--init", "small", "--out", "run", *changes)
    checkpoint = json.loads(out.splitlines()[-1])["checkpoint"]
    assert run(folder, "generate", "x = ", "--model", "small", "--adapter", checkpoint, "--max-new-tokens", "2")
    refused = run(folder, "adapter", "merge", checkpoint, "merged", "--model", "small", code=2)
    assert "cannot take an adapter in" in refused


def test_what_is_quantized_is_not_quantized_again(folder):
    assert "small is quantized already" in run(folder, "quantize", "small", "again", code=2)


def test_weights_without_a_gradient_name_the_way_that_works(folder):
    refused = run(folder, "train", "small", "--data", "tokens", "--init", "small", code=2)
    assert "which have no gradient" in refused
    assert "yuanmoe train m32-lora --init" in refused
