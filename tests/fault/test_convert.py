"""Conversions that are killed, run out of disk or memory, or are called wrongly: nothing that existed is damaged."""

import fcntl
import json
import os
import resource
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from checkpoint_writers import memory_folder, official_json, official_state, random_state, write_bin
from small_models import small_config
from yuanmoe.checkpoint.open import open_checkpoint
from yuanmoe.checkpoint.write.convert import convert_checkpoint
from yuanmoe.checkpoint.write.save import save_native
from yuanmoe.checkpoint.write.verify import verify_checkpoint
from yuanmoe.cli.main import app
from yuanmoe.errors import CheckpointError, ConfigError, ResourceError, UsageError
from yuanmoe.storage import folder as folders

CONFIG = small_config(hidden_size=12, head_dim=12, intermediate_size=0, tie_word_embeddings=False)
SHARD_BYTES = 8_000


@pytest.fixture
def src(tmp_path) -> Path:
    official = official_state(CONFIG, random_state(CONFIG))
    folder = write_bin(tmp_path / "src", official_json(CONFIG), official, shards=2)
    (folder / "tokenizer.model").write_text("pieces")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the manifest, whose fingerprint is of the source."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "manifest.json"}


# --- killed -----------------------------------------------------------------------------------------------------------

KILLED = """
import hashlib, json, os, shutil, signal, sys
from pathlib import Path
from yuanmoe.checkpoint.write.convert import convert_checkpoint

src, folder, older = map(Path, sys.argv[1:])

def digest(path):
    found = hashlib.sha256()
    for file in sorted(path.iterdir()):
        found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()

def run(dst, dies_at):
    events = 0
    def counted(function):
        def call(*args, **kwargs):
            nonlocal events
            events += 1
            if events == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call
    for name in ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    said = []
    written = convert_checkpoint(src, dst, shard_bytes=2500, overwrite=True, say=said.append,
                      progress=counted(lambda done, total: None))
    (folder / "report.json").write_text(json.dumps([written.resumed_shards, written.shards, said]))

def in_child(*args):
    pid = os.fork()
    if pid == 0:
        run(*args)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

assert in_child(folder / "whole", 0) == 0
whole = digest(folder / "whole")
results = []
for dies_at in range(1, 1000):
    dst = folder / f"dst{dies_at}"
    old = None
    if older.exists():
        shutil.copytree(older, dst)
        old = digest(dst)
    code = in_child(dst, dies_at)
    if code == 0:
        break
    after = digest(dst) if dst.exists() else None
    assert in_child(dst, 0) == 0
    resumed, shards, said = json.loads((folder / "report.json").read_text())
    leftovers = [path.name for path in folder.glob(f"dst{dies_at}.*")]
    results.append([code, "old" if after == old else "new" if after == whole else "damaged", digest(dst) == whole,
                    resumed, shards, leftovers, said])
print(json.dumps(results))
"""


@pytest.mark.parametrize("mode", ["new", "overwrite"])
def test_a_killed_conversion_leaves_what_was_there_and_goes_on(tmp_path, mode):
    """Killed before each flush, rename, removal and after each block, one after the other. The older checkpoint has
    files of the same names and sizes: none of them may end up in the new one."""
    config = small_config(num_hidden_layers=1, num_experts=0, hidden_size=12, head_dim=6, partial_rotary_factor=1.0)
    src = write_bin(tmp_path / "src", official_json(config), official_state(config, random_state(config)))
    older = tmp_path / "older"
    if mode == "overwrite":
        save_native(random_state(config, seed=1), config, older, shard_bytes=2500)
    with memory_folder() as folder:
        command = [sys.executable, "-c", KILLED, str(src), folder, str(older)]
        results = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=120).stdout)
    assert len(results) > 40
    for code, state, same, _, _, leftovers, said in results:
        assert code == -9
        assert state in ("old", "new")
        assert same
        assert leftovers == []
        assert said == [] or said[0].startswith("resuming") or said[0].startswith("starting over")
    reached = [resumed for code, state, same, resumed, shards, *_ in results if state == "old"]
    assert sorted(set(reached)) == list(range(results[0][4] + 1))


def interrupted(src: Path, dst: Path, at_share: float) -> None:
    def progress(done: int, total: int) -> None:
        if done >= at_share * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(src, dst, shard_bytes=SHARD_BYTES, progress=progress)


def test_a_changed_source_or_other_options_start_over_and_say_so(tmp_path, src):
    dst = tmp_path / "dst"
    interrupted(src, dst, 0.9)
    said: list[str] = []
    os.utime(src / "pytorch_model-00001-of-00002.bin", ns=(1, 1))
    assert convert_checkpoint(src, dst, shard_bytes=SHARD_BYTES, say=said.append).resumed_shards == 0
    assert "starting over" in said[0]
    interrupted(src, tmp_path / "other", 0.9)
    said.clear()
    assert convert_checkpoint(src, tmp_path / "other", dtype=torch.bfloat16, say=said.append).resumed_shards == 0
    assert "not of this source and these options" in said[0]
    interrupted(src, tmp_path / "same", 0.9)
    said.clear()
    assert convert_checkpoint(src, tmp_path / "same", shard_bytes=SHARD_BYTES, say=said.append).resumed_shards > 0
    assert "shards are there" in said[0]
    assert contents(tmp_path / "same") == contents(dst)


def test_a_finished_shard_that_was_damaged_since_is_written_again(tmp_path, src):
    interrupted(src, tmp_path / "dst", 0.9)
    shard = tmp_path / "dst.partial" / "checkpoint" / "model-00001-of-00007.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    written = convert_checkpoint(src, tmp_path / "dst", shard_bytes=SHARD_BYTES, say=lambda _: None)
    assert (written.resumed_shards, written.shards) == (5, 7)
    assert verify_checkpoint(tmp_path / "dst").hashed_bytes > 0


# --- disk -------------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_an_error_of_ours_and_the_next_run_goes_on(tmp_path, src):
    """The largest file that this process may write is shorter than one of the shards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, hard))
    try:
        with pytest.raises(ResourceError, match=r"the disk is full: .*dst\.partial.*run the same command again"):
            convert_checkpoint(src, tmp_path / "dst", shard_bytes=SHARD_BYTES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "dst").exists()
    assert convert_checkpoint(src, tmp_path / "dst", shard_bytes=SHARD_BYTES, say=lambda _: None).resumed_shards > 0
    convert_checkpoint(src, tmp_path / "at once", shard_bytes=SHARD_BYTES)
    assert contents(tmp_path / "dst") == contents(tmp_path / "at once")


def test_too_small_a_disk_is_refused_before_anything_is_written(tmp_path, src, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(2**40, 2**40 - 2**20, 2**20))
    with pytest.raises(ResourceError, match=r"dst\.partial/checkpoint still needs 16\.\d MiB, 1\.00 MiB are free"):
        convert_checkpoint(src, tmp_path / "dst")
    assert [path.name for path in (tmp_path / "dst.partial" / "checkpoint").iterdir()] == ["manifest.json"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path, src):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"writing .*file/dst\.partial failed"):
        convert_checkpoint(src, tmp_path / "file" / "dst")


# --- memory -----------------------------------------------------------------------------------------------------------

MEASURED = """
import json, re, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from yuanmoe.checkpoint.write.convert import convert_checkpoint
from yuanmoe.checkpoint.formats.native_config import parse_dtype

def status(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

src, small, folder = map(Path, sys.argv[1:])
convert_checkpoint(small, folder / "small", dtype=torch.bfloat16)  # imports
grown = []
steps = ((src, "native", "native", torch.bfloat16), (folder / "native", "again", "official", None))
for source, name, to, dtype in steps:
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status("VmRSS")
    convert_checkpoint(source, folder / name, to=to, dtype=dtype, shard_bytes=10**8)
    grown.append(status("VmHWM") - before)
print(json.dumps(grown))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells a process its peak memory")
def test_memory_does_not_grow_with_the_checkpoint(tmp_path, src):
    """206 MB of weights, of which one stack of experts has 67 MB, pass through less than that."""
    config = small_config(
        hidden_size=256, head_dim=128, num_experts=32, moe_intermediate_size=1024, intermediate_size=0
    )
    folder = write_bin(
        tmp_path / "large", official_json(config), official_state(config, random_state(config)), shards=2
    )
    command = [sys.executable, "-c", MEASURED, str(folder), str(src), str(tmp_path)]
    grown = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=120).stdout)
    assert max(grown) < 32 * 2**20
    assert open_checkpoint(tmp_path / "again").dtype == torch.bfloat16


# --- called wrongly ---------------------------------------------------------------------------------------------------


def test_what_exists_is_replaced_only_when_asked_and_only_a_checkpoint(tmp_path, src):
    dst = tmp_path / "dst"
    save_native(random_state(CONFIG, seed=1), CONFIG, dst)
    before = contents(dst)
    with pytest.raises(CheckpointError, match=r"dst exists and is left as it is; .*--overwrite"):
        convert_checkpoint(src, dst)
    config = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps(config | {"surprise": 1}))
    with pytest.raises(ConfigError, match="unknown config key"):
        convert_checkpoint(src, dst, overwrite=True)
    assert contents(dst) == before
    convert_checkpoint(src, dst, overwrite=True, ignore_unknown=True)
    assert contents(dst) != before
    notes = tmp_path / "notes"
    notes.mkdir()
    convert_checkpoint(src, notes, ignore_unknown=True)  # an empty folder is as good as none
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "diary.txt").write_text("dear")
    with pytest.raises(CheckpointError, match=r"home is not a checkpoint .* so it is not overwritten"):
        convert_checkpoint(src, tmp_path / "home", overwrite=True, ignore_unknown=True)
    with pytest.raises(CheckpointError, match=r"diary\.txt is a file; name a directory"):
        convert_checkpoint(src, tmp_path / "home" / "diary.txt", overwrite=True, ignore_unknown=True)


def test_where_names_cannot_be_exchanged_the_old_one_moves_aside(tmp_path, src, monkeypatch):
    save_native(random_state(CONFIG, seed=1), CONFIG, tmp_path / "dst")
    monkeypatch.setattr(folders, "_exchange", lambda a, b: False)
    convert_checkpoint(src, tmp_path / "dst", overwrite=True)
    convert_checkpoint(src, tmp_path / "new")
    assert contents(tmp_path / "dst") == contents(tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "new", "src"]


def test_the_source_is_never_the_destination(tmp_path, src):
    for dst in (src, tmp_path, tmp_path / "x" / ".." / "src"):
        with pytest.raises(UsageError, match="is or lies in the destination"):
            convert_checkpoint(src, dst, overwrite=True)
    with pytest.raises(UsageError, match="cannot convert to 'gguf'; known: native, official"):
        convert_checkpoint(src, tmp_path / "dst", to="gguf")


def test_two_processes_do_not_write_the_same_destination(tmp_path, src):
    partial = tmp_path / "dst.partial"
    partial.mkdir()
    descriptor = os.open(partial, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(CheckpointError, match=r"another process is writing .*dst\.partial"):
        convert_checkpoint(src, tmp_path / "dst")
    os.close(descriptor)
    (partial / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"dst\.partial is in the way"):
        convert_checkpoint(src, tmp_path / "dst")
    assert (partial / "notes.txt").read_text() == "mine"


def test_a_state_that_is_not_the_models_is_not_saved(tmp_path):
    state = random_state(CONFIG)
    del state["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"the state to save: tensor 'model\.norm\.weight' is missing"):
        save_native(state, CONFIG, tmp_path / "dst")
    assert not any(tmp_path.iterdir())


def test_verify_finds_a_flipped_bit_and_a_missing_file(tmp_path, src):
    convert_checkpoint(src, tmp_path / "dst", shard_bytes=SHARD_BYTES)
    found = verify_checkpoint(tmp_path / "dst")
    assert (found.format, found.tensors) == ("native", len(open_checkpoint(src).tensors))
    shard = sorted((tmp_path / "dst").glob("*.safetensors"))[2]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=rf"{shard.name} is damaged: its sha256 is [0-9a-f]{{64}}, manifest\.json says"
    ):
        verify_checkpoint(tmp_path / "dst")
    manifest = json.loads((tmp_path / "dst" / "manifest.json").read_text())
    manifest["shards"]["model-00009-of-00009.safetensors"] = manifest["shards"][shard.name]
    (tmp_path / "dst" / "manifest.json").write_text(json.dumps(manifest))
    shard.write_bytes(bytes(content[:-1]) + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"model-00009-of-00009\.safetensors is missing"):
        verify_checkpoint(tmp_path / "dst")
    assert verify_checkpoint(src).hashed_bytes == 0


# --- from the command line --------------------------------------------------------------------------------------------


def test_commands_print_one_line_of_json(tmp_path, src):
    run = CliRunner().invoke(
        app, ["convert", str(src), str(tmp_path / "dst"), "--dtype", "bf16", "--rope-theta", "40890"]
    )
    assert run.exit_code == 0, run.stderr
    result = json.loads(run.stdout)
    assert (result["to"], result["shards"], result["resumed_shards"]) == ("native", 1, 0)
    assert result["bytes"] == 2 * sum(tensor.numel for tensor in open_checkpoint(src).tensors.values())
    assert open_checkpoint(tmp_path / "dst").config.rope_theta == 40890.0
    run = CliRunner().invoke(app, ["verify", str(tmp_path / "dst")])
    assert json.loads(run.stdout)["hashed_bytes"] > result["bytes"]
    run = CliRunner().invoke(app, ["convert", str(src), str(tmp_path / "dst")])
    assert run.exit_code == 1
    assert "is left as it is" in run.stderr
    assert run.stdout == ""
    run = CliRunner().invoke(app, ["convert", str(src), str(tmp_path / "d"), "--dtype", "int3"])
    assert run.exit_code == 2
    assert "unknown dtype 'int3'; known: float64, float32, float16, bfloat16" in run.stderr
