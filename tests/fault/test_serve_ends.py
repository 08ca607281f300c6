"""A server told to end by a signal: answers finish for a bounded time, and nobody waits for longer."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager

import httpx
import pytest

from serving import LONG
from small_lm import write_lm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    write_lm(folder, max_position_embeddings=4096)
    return folder


def program(folder, *options: str) -> tuple[subprocess.Popen, str]:
    """`yuanmoe serve` as a process, and its URL."""
    command = [sys.executable, "-m", "yuanmoe", "serve", "--model", str(folder), "--port", "0", *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())["url"]


def answering(stream: httpx.Response) -> Iterator[dict | None]:
    """The events of a stream, once the first is there; None for the end."""
    lines = (line.removeprefix("data: ") for line in stream.iter_lines() if line)
    events = (None if line == "[DONE]" else json.loads(line) for line in lines)
    return itertools.chain([next(events)], events)


def wait_for_drain(address: str) -> None:
    """Until the server takes no connections."""
    with contextlib.suppress(httpx.ConnectError):
        while True:
            httpx.get(f"{address}/health")


def ask(address: str, **changes: object) -> AbstractContextManager[httpx.Response]:
    return httpx.stream("POST", f"{address}/v1/completions", json=LONG | {"stream": True} | changes, timeout=30)


def test_sigterm_lets_answers_finish_for_a_bounded_time(folder) -> None:
    process, address = program(folder, "--drain", "2")
    try:
        usage = {"include_usage": True}
        with ask(address, max_tokens=40, stream_options=usage) as brief, ask(address, max_tokens=4000) as endless:
            said, cut = answering(brief), answering(endless)
            process.send_signal(signal.SIGTERM)
            *_, total, done = said
            assert (total["usage"]["completion_tokens"], done) == (40, None)
            wait_for_drain(address)
            *_, last = cut
            assert last["error"]["code"] == "shutting_down"
        assert process.wait(10) == 0
        assert "Traceback" not in process.communicate()[1]
    finally:
        process.kill()
        process.communicate()


def test_a_second_ctrl_c_ends_at_once(folder) -> None:
    process, address = program(folder, "--drain", "60")
    try:
        with ask(address, max_tokens=4000) as stream:
            answering(stream)
            process.send_signal(signal.SIGINT)
            wait_for_drain(address)
            process.send_signal(signal.SIGINT)
            assert process.wait(15) == 130
            assert "Traceback" not in process.communicate()[1]
    finally:
        process.kill()
        process.communicate()
