"""Which files of the package one piece of work enters, in order: `python tests/trips.py NAME FOLDER`.

A file counts when one of its functions is called for the first time, in any thread. Everything is imported beforehand,
so that importing a file does not count as entering it. FOLDER holds `model` (native, small), `official` and `tokens`.
The names and what they run are in `TRIPS`. The result is one line of JSON on stdout, after what the command prints.
"""

import json
import os
import pkgutil
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from importlib import import_module
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import FrameType
from typing import Any

import yuanmoe

ROOT = str(Path(yuanmoe.__file__).parent) + os.sep
ONE_STEP = (
    "model.vocab_size=512", "model.hidden_size=32", "model.num_experts=8", "model.moe_intermediate_size=24",
    "model.num_attention_heads=2", "model.head_dim=16", "data.sequence_length=16", "data.batch_size=4",
    "schedule.max_seconds=none", "schedule.max_tokens=64", "run.milestones=1",
)  # fmt: skip
DEADLINE_S = 60


class Recorder:
    """Remembers the files of the package in the order in which their functions are first called."""

    def __init__(self, until: str | None = None) -> None:
        self.files: dict[str, None] = {}
        self.until = until
        """Qualified name of the function whose return ends the trip; None where the command ends it."""
        self.active = True

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if not self.active or not code.co_filename.startswith(ROOT):
            return
        if event == "call" and code.co_flags & CO_OPTIMIZED:
            self.files.setdefault(code.co_filename[len(ROOT) :])
        elif event == "return" and code.co_qualname == self.until:
            self.active = False


def _import_everything() -> None:
    for module in pkgutil.walk_packages([ROOT], "yuanmoe."):
        if module.name.rpartition(".")[2] not in ("__main__", "libyuanmoe") and ".hf" not in module.name:
            import_module(module.name)


def _call(arguments: list[str]) -> None:
    sys.argv = ["yuanmoe", *arguments]
    main: Any = import_module("yuanmoe.cli.main")
    try:
        main.main()
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"the command ended with {end.code}: {arguments}") from end


def _run(arguments: list[str], until: str | None = None) -> Recorder:
    recorder = Recorder(until)
    threading.setprofile(recorder)
    sys.setprofile(recorder)
    _call(arguments)
    sys.setprofile(None)
    threading.setprofile(None)  # pyright: ignore[reportArgumentType]
    return recorder


def _generate(folder: Path) -> Recorder:
    return _run(["generate", "--model", str(folder / "model"), "def add", "--max-new-tokens", "4"])


def _convert(folder: Path) -> Recorder:
    return _run(["convert", str(folder / "official"), str(folder / "converted")])


def _quantize(folder: Path) -> Recorder:
    return _run(["quantize", str(folder / "model"), str(folder / "quantized"), "--bits", "4"])


def _train(folder: Path) -> Recorder:
    settings = [part for setting in ONE_STEP for part in ("--set", setting)]
    out = str(folder / "run")
    data = str(folder / "tokens")
    return _run(["train", "nano", "--data", data, "--out", out, *settings], until="Training.advance")


def _request(folder: Path) -> Recorder:
    """The server of the command in this thread; a client in another one asks for one token and ends the server."""
    recorder = Recorder()
    recorder.active = False
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def ask() -> None:
        try:
            _first_chunk(f"http://127.0.0.1:{port}", recorder)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    client = threading.Thread(target=ask)
    threading.setprofile(recorder)
    sys.setprofile(recorder)
    client.start()
    _call(["serve", "--model", str(folder / "model"), "--port", str(port)])
    sys.setprofile(None)
    client.join()
    return recorder


def _first_chunk(url: str, recorder: Recorder) -> None:
    end = time.monotonic() + DEADLINE_S
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            break
        except OSError:
            assert time.monotonic() < end, "the server did not come up"
            time.sleep(0.1)
    body = json.dumps({"prompt": "def add", "max_tokens": 1, "stream": True}).encode()
    headers = {"Content-Type": "application/json"}
    recorder.active = True
    with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", body, headers), timeout=30) as answer:
        answer.read()
        recorder.active = False


TRIPS: dict[str, Callable[[Path], Recorder]] = {
    "generate": _generate,
    "request": _request,
    "convert": _convert,
    "quantize": _quantize,
    "train": _train,
}


if __name__ == "__main__":
    name, place = sys.argv[1:]
    _import_everything()
    files = list(TRIPS[name](Path(place)).files)
    print()
    print(json.dumps(files))
