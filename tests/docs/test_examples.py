"""The example at the end of every command's help: it is there, it stands alone, and it runs."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from small_adapters import adapted
from small_lm import lm_config
from small_models import random_model
from small_tokenizers import bpe
from yuanmoe.bench.record import BEGIN, END
from yuanmoe.checkpoint.adapters.adapter import save_adapter
from yuanmoe.checkpoint.write.save import save_native
from yuanmoe.cli.examples import EXAMPLES
from yuanmoe.cli.main import COMMANDS, load_command

SHORTER = {
    "train": "--set data.sequence_length=64 --set data.batch_size=1 --set data.micro_batch_size=1 "
    "--set schedule.max_tokens=128",
    "bench layers": "--runs 1 --no-peer --threads 1 --dtype float32",
    "bench": "--runs 1 --no-peer --threads 1 --dtype float32",
    "bench decode": "--runs 1 --no-peer --threads 1",
    "serve": "--port 0",
}
"""Added so that tests end soon, and take no port that another program has."""
ALIKE = {"adapter", "demo", ""}
"""Run as the example of another command, or by a test of their own (`test_demo.py`)."""


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    command = [sys.executable, "-m", "yuanmoe", *words]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=240, input="hello\n"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the examples name."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "README.md").write_text("A text about models, to look at and to learn from.\n" * 20 + f"{BEGIN}\n{END}\n")
    (folder / "src").mkdir()
    (folder / "docs" / "measurements").mkdir(parents=True)
    for place in range(60):
        (folder / "src" / f"part{place}.py").write_text(f"def number_{place}():\n    return {place}\n" * 8)
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "head_dim": 64, "moe_intermediate_size": 64}
    model = random_model(lm_config(bpe(), max_position_embeddings=256, **sizes))
    save_native(model.state_dict(), model.config, folder / "Yuan2-M32-hf")
    bpe().save(folder / "Yuan2-M32-hf")
    save_adapter(adapted(base=model)[1], folder / "my-adapter")
    return folder


def commands() -> list[str]:
    names = [""]
    for name in COMMANDS:
        names += [name, *(f"{name} {inner}" for inner in getattr(load_command(name), "commands", {}))]
    return names


def test_every_command_has_one():
    assert sorted(EXAMPLES) == sorted(commands())


@pytest.mark.parametrize("name", EXAMPLES, ids=lambda name: name or "yuanmoe")
def test_help_ends_with_it(name, tmp_path):
    shown = run(tmp_path, *name.split(), "--help").stdout.rstrip().splitlines()
    assert [line.strip() for line in shown[-2:]] == ["Example:", EXAMPLES[name]]
    assert EXAMPLES[name].startswith(f"yuanmoe {name}".rstrip())


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in ALIKE | {"serve"}])
def test_it_runs(folder, name):
    program, *words = shlex.split(EXAMPLES[name])
    assert program == "yuanmoe"
    done = run(folder, *words, *SHORTER.get(name, "").split())
    assert done.returncode == 0, done.stderr
    assert done.stdout


def wait_for(address: str) -> None:
    for _ in range(300):
        try:
            urllib.request.urlopen(address, timeout=10).close()
        except urllib.error.URLError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError(f"{address} does not answer")


def test_the_server_starts_and_ends(tmp_path):
    _, *words = shlex.split(EXAMPLES["serve"])
    command = [sys.executable, "-m", "yuanmoe", *words, *SHORTER["serve"].split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        address = json.loads(process.stdout.readline())["url"]
        wait_for(f"{address}/health")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 0
