"""LoRA from the command line on a tiny model, stopped and resumed, and all that can be wrong with an adapter."""

import dataclasses
import json
import os
import shutil
import signal
import sys

import pytest
from safetensors.torch import load_file, save_file

import yuanmoe
from small_adapters import adapted, settings
from small_lm import write_lm
from small_models import random_model, small_config
from small_runs import FIELDS_OF_TIME, write_tokens
from yuanmoe.checkpoint.adapters.adapter import attach_adapter, open_adapter, save_adapter
from yuanmoe.checkpoint.open import open_checkpoint
from yuanmoe.checkpoint.quantize.quantize import quantize_checkpoint
from yuanmoe.cli.main import main
from yuanmoe.cli.train import job as training
from yuanmoe.errors import CheckpointError, ConfigError
from yuanmoe.model.lora.targets import LoraSettings
from yuanmoe.plan.device.machine import Rate
from yuanmoe.storage.run_folder import read_metrics
from yuanmoe.train.recipe.recipe import BalanceSettings
from yuanmoe.train.recipe.recipes import named
from yuanmoe.train.state.checkpoint import FACTS, steps
from yuanmoe.train.state.stored import TENSORS
from yuanmoe.train.steps.loop import Training

TINY = (
    "data.sequence_length=16", "data.batch_size=4", "data.micro_batch_size=2", "schedule.max_tokens=384",
    "run.milestones=2", "run.dtype=float32", 'run.prompts=["def add"]', "run.sample_tokens=4", "lora.rank=4",
    "optimizer.learning_rate=1e-2",
)  # fmt: skip
"""Settings that make `m32-lora` six steps of milliseconds."""
STEPS, HALF = 6, 2


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the program in this process, without its measurement of the machine: exit code, stdout, stderr."""
    monkeypatch.setattr(training, "matmul_rate", lambda *_, **__: Rate(median=1e9, low=1e9, high=1e9))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["yuanmoe", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "120")
        with pytest.raises(SystemExit) as exit_info:
            main()
        captured = capsys.readouterr()
        code = exit_info.value.code
        return (code if isinstance(code, int) else 0), captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, the same in 4 bits, and text to learn."""
    folder = tmp_path_factory.mktemp("lora")
    write_lm(folder / "base", hidden_size=32, head_dim=16, initializer_range=0.1)
    quantize_checkpoint(folder / "base", folder / "four", bits=4)
    write_tokens(folder / "data")
    return folder


def arguments(folder, out, *options, base="base", changes=()):
    given = [part for setting in (*TINY, *changes) for part in ("--set", setting)]
    data = ("--data", folder / "data", "--init", folder / base, "--out", out, "--threads", 1)
    return ["train", "m32-lora", *data, *given, *options]


def last_line(out):
    return json.loads(out.splitlines()[-1])


def checkpoint(out):
    return out / "checkpoints" / f"step-{steps(out / 'checkpoints')[-1]}"


def test_a_run_from_training_to_answers_merging_and_peft(run, folder, tmp_path):
    code, out, err = run(*arguments(folder, tmp_path / "run", changes=("lora.targets=q,v,experts",)))
    assert code == 0, err
    adapter = checkpoint(tmp_path / "run")
    assert sorted(path.name for path in adapter.iterdir()) == [
        "adapter.safetensors", "config.json", "manifest.json", FACTS, TENSORS,
    ]  # fmt: skip
    tensors, state = load_file(adapter / "adapter.safetensors"), load_file(adapter / TENSORS)
    learned = sum(tensor.numel() for tensor in tensors.values())
    assert sum(tensor.numel() for tensor in state.values()) == 2 * learned  # two moments of the factors, and no more
    said = [line.split() for line in err.splitlines()]
    shown = {row[0]: int(row[2].replace(",", "")) for row in said if len(row) == 3 and row[0] in ("q", "v", "experts")}
    for role, mark in (("q", "q_proj"), ("v", "v_proj"), ("experts", "experts")):
        assert shown[role] == sum(tensor.numel() for name, tensor in tensors.items() if mark in name)
    assert f"  {learned:,} parameters learn beside" in err
    assert "LoRA of rank 4, scale 8, routers frozen" in err
    losses = [line["loss"] for line in read_metrics(tmp_path / "run")]
    assert losses[-1] < losses[0]

    code, out, _ = run("adapter", "show", adapter)
    assert (code, last_line(out)["parameters"], last_line(out)["base"]) == (0, learned, "base")
    answers = {}
    for name, options in {"plain": (), "adapted": ("--adapter", adapter)}.items():
        call = ("generate", "--model", folder / "base", "def add", "--max-new-tokens", 8, "--json", *options)
        answers[name] = last_line(run(*call)[1])
    assert answers["plain"]["ids"] != answers["adapted"]["ids"]
    code, _, err = run("adapter", "merge", adapter, tmp_path / "merged", "--model", folder / "base")
    assert code == 0, err
    _, out, _ = run("generate", "--model", tmp_path / "merged", "def add", "--max-new-tokens", 8, "--json")
    assert last_line(out)["ids"] == answers["adapted"]["ids"]
    code, out, err = run("adapter", "export-peft", adapter, tmp_path / "peft")
    assert code == 0, err
    assert (tmp_path / "peft" / "adapter_model.safetensors").is_file()
    code, _, err = run("adapter", "merge", adapter, tmp_path / "other", "--model", folder / "four")
    assert code == 2
    assert "merge it into the checkpoint that they were made of and quantize the result" in err


@pytest.mark.parametrize("base", ["base", "four"])
def test_a_run_that_is_stopped_goes_on_bit_for_bit(run, folder, tmp_path, base, monkeypatch):
    changes = ("lora.dropout=0.1", "lora.router=true")
    assert run(*arguments(folder, tmp_path / "whole", base=base, changes=changes))[0] == 0
    advance = Training.advance

    def stopped(self):
        if self.step == HALF:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(self)

    monkeypatch.setattr(Training, "advance", stopped)
    code, _, err = run(*arguments(folder, tmp_path / "run", base=base, changes=changes))
    assert code == 128 + signal.SIGTERM, err
    assert HALF < steps(tmp_path / "run" / "checkpoints")[-1] + 1 < STEPS
    monkeypatch.setattr(Training, "advance", advance)
    code, _, err = run(*arguments(folder, tmp_path / "run", "--resume", base=base, changes=changes))
    assert code == 0, err
    one, other = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "run")
    assert one.name == other.name == f"step-{STEPS}"
    for name in ("adapter.safetensors", TENSORS):
        first, second = load_file(one / name), load_file(other / name)
        assert first.keys() == second.keys()
        assert all(tensor.equal(second[key]) for key, tensor in first.items())
    lines = [
        [{key: value for key, value in line.items() if key not in FIELDS_OF_TIME} for line in read_metrics(path)]
        for path in (tmp_path / "whole", tmp_path / "run")
    ]
    assert lines[0] == lines[1]


def test_what_a_run_of_lora_refuses(run, folder, tmp_path):
    cases = {
        (
            "lora.targets=q,dense",
        ): "LoRA of dense matches nothing in this model, which has q, k, v, o, lfa, experts, head",
        ("lora.targets=q,gate",): "lora.targets has gate; known: q, k, v, o, lfa, experts, shared_experts, dense, head",
        ("model.hidden_size=64",): "the weights would not fit",
        ("lora.rnk=4",): "did you mean lora.rank?",
    }
    for changes, message in cases.items():
        code, _, err = run(*arguments(folder, tmp_path / "run", changes=changes))
        assert code != 0
        assert message in err
    code, _, err = run("train", "m32-lora", "--data", folder / "data")
    assert code == 2
    assert "LoRA adapts a model that is there: name its checkpoint with --init" in err
    code, _, err = run("train", "nano", "--set", "lora.rank=4", "--show")
    assert code == 2
    assert "unknown setting 'lora.rank'" in err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "lora.rank is 0; it must be at least 1"),
        ({"alpha": 0.0}, "lora.alpha is 0.0; it must be a number above 0"),
        ({"dropout": 1.0}, "lora.dropout is 1.0; it must be from 0 to below 1"),
        ({"targets": ()}, "lora.targets is empty"),
        ({"targets": ("router",)}, "the routers are lora.router=true"),
    ],
)
def test_settings_that_describe_no_adapter(changes, message):
    with pytest.raises(ConfigError, match=message):
        LoraSettings(**changes)


def test_biases_of_a_frozen_base_are_not_moved():
    made = named("m32-lora")
    settled = dataclasses.replace(made, model=made.model.replace(router_bias=True))
    with pytest.raises(ConfigError, match="moves biases of the base, which LoRA leaves alone"):
        dataclasses.replace(settled, balance=BalanceSettings(bias_rate=0.001))


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    _, adapter = adapted()
    save_adapter(adapter, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_another_base_is_refused(saved):
    for other in (random_model(small_config(), seed=5), random_model(small_config(hidden_size=32))):
        with pytest.raises(CheckpointError, match=r"belongs to small \(fingerprint \w+\), not to this model"):
            attach_adapter(other, open_adapter(saved))


def test_a_damaged_adapter_is_refused(saved):
    file, model = saved / "adapter.safetensors", random_model(small_config())
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name][:-1].clone()}, file)
    with pytest.raises(CheckpointError, match=f"1 tensors do not fit the model, such as {name}"):
        attach_adapter(model, open_adapter(saved))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    with pytest.raises(CheckpointError, match=r"are no pair; adapter\.safetensors is damaged"):
        open_adapter(saved)
    save_file({key: tensor for key, tensor in tensors.items() if "q_proj" not in key}, file)
    with pytest.raises(CheckpointError, match="4 tensors do not fit the model"):
        attach_adapter(model, open_adapter(saved))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="truncated"):
        open_adapter(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "has version 2 of the format of adapters, this package reads 1; update it"),
        ({"lora": {"rank": "four", "targets": ["q"]}}, "describes no adapter"),
        ({"lora": {"rank": 4, "targets": ["gate"]}}, "describes no adapter"),
        ({"base": {}}, "describes no adapter"),
        ({"format": "yuanmoe"}, "is no adapter"),
    ],
)
def test_a_config_that_describes_no_adapter(saved, changes, message):
    file = saved / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        open_adapter(saved)


def test_an_adapter_is_no_model_and_a_model_no_adapter(saved, folder):
    with pytest.raises(CheckpointError, match="is an adapter, no model; give its base as the model, and it with --ad"):
        open_checkpoint(saved)
    with pytest.raises(CheckpointError, match=r"is no adapter: .* an adapter is what"):
        open_adapter(folder / "base")


def test_adapters_are_swapped_at_run_time(folder, tmp_path):
    lm = yuanmoe.load(folder / "base")
    answer = lm.score("def add(a, b):")
    scores = {}
    for seed in (1, 2):
        _, adapter = adapted(made=settings("experts", "o"), seed=seed, base=lm.model)
        save_adapter(adapter, tmp_path / str(seed))
        lm.detach()
    for seed in (1, 2, 1):
        lm.attach(tmp_path / str(seed))
        assert lm.adapter is not None
        assert lm.adapter.place == str(tmp_path / str(seed))
        scores.setdefault(seed, lm.score("def add(a, b):"))
        assert lm.score("def add(a, b):") == scores[seed] != answer
    assert scores[1] != scores[2]
    _, foreign = adapted()
    with pytest.raises(CheckpointError, match="belongs to small"):
        lm.attach(foreign)
    assert lm.score("def add(a, b):") == scores[1]
    lm.detach()
    assert lm.score("def add(a, b):") == answer
    assert yuanmoe.load(folder / "base", adapter=tmp_path / "2").score("def add(a, b):") == scores[2]
    save_adapter(foreign, tmp_path / "foreign")
    with pytest.raises(CheckpointError, match="belongs to small"):
        yuanmoe.load(folder / "base", adapter=tmp_path / "foreign")


def test_a_write_that_is_repeated_replaces_nothing_unasked(run, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "there")
    code, _, err = run("adapter", "export-peft", saved, tmp_path / "there")
    assert code == 1
    assert "exists and is left as it is" in err
    code, _, err = run("adapter", "export-peft", saved, tmp_path / "there", "--overwrite")
    assert code == 1
    assert "is not a PEFT adapter (it has no adapter_config.json)" in err
