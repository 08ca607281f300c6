"""What a command prints where people read stdout, a pseudo-terminal: no JSON, unless `--json` asks for it."""

import json
import os
import pty
import re
import subprocess
import sys

import pytest

from yuanmoe.cli.main import COMMANDS, load_command
from yuanmoe.cli.terminal.output import print_result

TALKS = {"chat"}
"""A conversation has no result."""


def at_a_terminal(folder, *words, stdin=None):
    """Exit code and what a command wrote to a terminal, stdout and stderr together."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "200"}
    command = [sys.executable, "-m", "yuanmoe", *words]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # Linux: the other end is closed.
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    return process.wait(timeout=120), re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode(errors="replace"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("terminal")
    (folder / "text.py").write_text("def add(first, second):\n    return first + second\n" * 20)
    return folder


CALLS = [
    ("plan M32 --device h200", "Compute beside Llama-3-70B"),
    ("doctor", "GB/s"),
    ("verify small", "native"),
    ("convert small copy", "tensors"),
    ("generate x --max-new-tokens 2", "prompt: "),
    ("inspect --model small --text text.py --tokens 32", "layer"),
    ("data pack text.py tokens --tokenizer small", "tokens of 1 documents"),
    ("data info tokens", "documents"),
    ("data verify tokens", "as they were written"),
    ("data preview tokens", "are learned"),
    ("data export tokens pair", "documents"),
    ("train nano --show", "optimizer"),
    ("bench layers --preset tiny --layers 1 --prompt-tokens 8 --runs 1 --no-peer", "tokens/s"),
    ("bench decode --model small --contexts 4 --prompts 4 --runs 1 --no-peer", "tokens/s"),
]


@pytest.mark.parametrize(("words", "seen"), CALLS, ids=[words for words, _ in CALLS])
def test_people_see_no_json(folder, words, seen):
    code, shown = at_a_terminal(folder, *words.split())
    assert code == 0, shown
    assert seen in shown
    assert not [line for line in shown.splitlines() if line.startswith(("{", "["))]


@pytest.mark.parametrize(
    "words", ["plan M32 --device h200 --json", "verify small --json", "generate x --max-new-tokens 2 --json"]
)
def test_json_is_there_when_asked_for(folder, words):
    code, shown = at_a_terminal(folder, *words.split())
    assert code == 0, shown
    assert json.loads(shown.splitlines()[-1])


def test_a_key_is_shown_to_people_by_itself(folder):
    code, shown = at_a_terminal(folder, "api-key", "alice", "--file", "keys.txt")
    assert code == 0
    assert len(shown.splitlines()[-1].split()) == 1
    assert '"key"' not in shown


def test_every_command_takes_json():
    for name in set(COMMANDS) - TALKS:
        command = load_command(name)
        for inner, each in (getattr(command, "commands", None) or {"": command}).items():
            assert "json_only" in [option.name for option in each.params], f"{name} {inner}"


def test_programs_always_get_the_result(capsys):
    print_result({"done": True})
    assert json.loads(capsys.readouterr().out) == {"done": True}
