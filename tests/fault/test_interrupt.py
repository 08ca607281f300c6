"""Ctrl-C in the middle of an answer: what was said stays on the screen, whole, in the statistics and in the history."""

import contextlib
import fcntl
import itertools
import json
import os
import re
import select
import signal
import subprocess
import sys
import termios
import time

import pytest
import torch

from small_lm import write_lm
from yuanmoe.cli.main import main
from yuanmoe.cli.terminal.interrupt import Interrupt
from yuanmoe.text.detokenize import StreamingDetokenizer

LONG = {"max_position_embeddings": 50_000}
"""A context that no test lives to see the end of."""
DEADLINE_S = 60


@pytest.fixture(autouse=True)
def _one_thread():
    """Products this small only wait for a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, write_lm(folder, **LONG)


def command(*arguments):
    return [sys.executable, "-m", "yuanmoe", *map(str, arguments), "--threads", "1"]


def read_until(descriptor, wanted, heard=b""):
    """Everything up to the first appearance of a pattern, at least; fails loudly when it does not come."""
    deadline = time.monotonic() + DEADLINE_S
    while not re.search(wanted, heard, re.DOTALL):
        ready, _, _ = select.select([descriptor], [], [], max(0, deadline - time.monotonic()))
        assert ready, f"{wanted!r} did not come within {DEADLINE_S} s: {heard!r}"
        data = os.read(descriptor, 65536)
        assert data, f"{wanted!r} did not come before the end: {heard!r}"
        heard += data
    return heard


def said(lm, prompt, count, **sampling):
    completion = lm.generate(prompt, max_new_tokens=count, stop_ids=(), **sampling)
    return lm.tokenizer.decode(completion.ids, skip_special=True)


def test_generate_keeps_the_text_and_says_how_much_it_was(checkpoint):
    folder, lm = checkpoint
    line = command("generate", "def add(", "--model", folder, "--max-new-tokens", 40_000)
    with started(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        heard = read_until(process.stdout.fileno(), rb".{40}")
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130, err.decode()
    count = int(re.search(r"answer: ([\d,]+) tokens in", err.decode())[1].replace(",", ""))
    assert (heard + rest).decode() == said(lm, "def add(", count) + "\n"


def test_chat_keeps_the_answer_in_the_history_and_goes_on(checkpoint, tmp_path):
    folder, lm = checkpoint
    saved = tmp_path / "saved.json"
    keyboard, terminal = os.openpty()
    line = command("chat", "--model", folder, "--temperature", 0)
    streams = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    environment = os.environ | {"TERM": "xterm", "LC_ALL": "C.UTF-8"}
    with started(line, **streams, env=environment, preexec_fn=own_terminal) as process:
        os.close(terminal)
        read_until(keyboard, rb">>> ")
        os.write(keyboard, b"hello\r")
        # The cursor comes back when the first token does.
        read_until(keyboard, rb"hello\r\n.*\x1b\[\?25h.{60}")
        os.write(keyboard, b"\x03")
        shown = read_until(keyboard, rb"stopped, and kept as far as it went.*>>> ").decode()
        os.write(keyboard, f"/save {saved}\r".encode())
        read_until(keyboard, rb"saved 2 messages.*>>> ")
        assert leave(process, keyboard) == 0
    os.close(keyboard)
    count = int(re.search(r"answer: ([\d,]+) tokens in", shown)[1].replace(",", ""))
    prompt = lm.chat_ids([{"role": "user", "content": "hello"}])
    question, answer = json.loads(saved.read_text("utf-8"))["messages"]
    assert question == {"role": "user", "content": "hello"}
    assert answer == {"role": "assistant", "content": said(lm, prompt, count)}


def leave(process, keyboard):
    """Types Ctrl-C at the prompt, again where it was lost: Python overlooks one between readline's prompt and wait."""
    for _ in range(6):
        os.write(keyboard, b"\x03")
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(DEADLINE_S / 6)
    return None


@contextlib.contextmanager
def started(line, **options):
    """A process that ends with the test, however the test ends."""
    with subprocess.Popen(line, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def own_terminal():
    """Makes stdin the controlling terminal of a session of its own, so that a typed Ctrl-C becomes SIGINT there."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def run(monkeypatch, capsys, checkpoint):
    """`yuanmoe generate` in this process with Ctrl-C at given tokens: exit code, stdout, stderr."""

    def call(*arguments, at_tokens):
        count = itertools.count(1)
        push = StreamingDetokenizer.push

        def push_and_interrupt(self, token_id):
            if next(count) in at_tokens:
                signal.raise_signal(signal.SIGINT)
            return push(self, token_id)

        monkeypatch.setattr(StreamingDetokenizer, "push", push_and_interrupt)
        monkeypatch.setattr(sys, "argv", ["yuanmoe", "generate", "--model", str(checkpoint[0]), *arguments])
        with pytest.raises(SystemExit) as exit_info:
            main()
        captured = capsys.readouterr()
        monkeypatch.undo()
        return exit_info.value.code, captured.out, captured.err

    return call


def test_the_token_at_hand_is_finished_and_no_other_begun(run, checkpoint):
    code, out, err = run("def add(", at_tokens=[12])
    assert (code, out) == (130, said(checkpoint[1], "def add(", 12) + "\n")
    assert "answer: 12 tokens in" in err
    code, out, _ = run("def add(", "--json", at_tokens=[12])
    result = json.loads(out)
    assert (code, result["finish_reason"], result["new_tokens"]) == (130, "interrupted", 12)
    assert result["text"] == said(checkpoint[1], "def add(", 12)


def test_before_the_first_token_there_is_nothing_to_keep(run):
    code, out, err = run("def add(", at_tokens=[1])
    assert (code, out) == (130, "\n")
    assert "Traceback" not in err


def test_text_held_back_for_a_stop_string_is_said_after_all(run, checkpoint):
    text = said(checkpoint[1], "def add(", 12)
    assert run("def add(", "--stop", text[-1] + "never", at_tokens=[12])[:2] == (130, text + "\n")


def test_a_second_ctrl_c_does_not_wait():
    with Interrupt() as interrupt:
        interrupt.graceful = True
        signal.raise_signal(signal.SIGINT)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
