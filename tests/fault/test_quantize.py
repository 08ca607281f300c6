"""Quantizing that is killed, runs out of disk, or meets damaged files, and models that do not fit into memory."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from checkpoint_writers import memory_folder, official_json, official_state, write_bin
from small_models import random_ids, random_model, small_config
from yuanmoe.checkpoint import load
from yuanmoe.checkpoint.files.mapped import MappedBytes
from yuanmoe.checkpoint.formats.mapping import layout
from yuanmoe.checkpoint.load import load_model
from yuanmoe.checkpoint.open import open_checkpoint
from yuanmoe.checkpoint.quantize.quantize import quantize_checkpoint
from yuanmoe.checkpoint.write.save import save_native
from yuanmoe.checkpoint.write.verify import verify_checkpoint
from yuanmoe.errors import CheckpointError, ConfigError, ResourceError, UsageError

CONFIG = small_config(hidden_size=64, head_dim=64, intermediate_size=0, moe_intermediate_size=32)
SHARD_BYTES = 20_000


@pytest.fixture
def src(tmp_path) -> Path:
    folder = write_bin(tmp_path / "src", official_json(CONFIG), official_state(CONFIG, state()), shards=2)
    (folder / "tokenizer.model").write_text("pieces")
    return folder


def state(config=CONFIG):
    return {name: tensor.bfloat16() for name, tensor in random_model(config).state_dict().items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- killed -----------------------------------------------------------------------------------------------------------

KILLED = """
import hashlib, json, os, random, signal, sys
from pathlib import Path
import torch
from yuanmoe.checkpoint.quantize.quantize import quantize_checkpoint

src, folder, method, deaths = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
torch.set_num_threads(1 if method == "gptq" else 2)
settings = {"bits": 4, "method": method, "shard_bytes": 4000}
if method == "gptq":
    settings["calibration"] = [random.Random(0).randrange(1, 32) for _ in range(60)]

def digest(path):
    found = hashlib.sha256()
    for file in sorted(path.iterdir()):
        found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()

def run(dst, dies_at, events_file):
    events = 0
    def counted(function):
        def call(*args, **kwargs):
            nonlocal events
            events += 1
            if events == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call
    for name in ("fsync", "replace", "rename", "mkdir", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    done = quantize_checkpoint(src, dst, say=lambda _: None, progress=counted(lambda done, total: None), **settings)
    events_file.write_text(json.dumps([events, done.written is None or done.written.resumed_shards]))

def in_child(*args):
    pid = os.fork()
    if pid == 0:
        run(*args)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

facts = folder / "facts.json"
assert in_child(folder / "whole", 0, facts) == 0
events, _ = json.loads(facts.read_text())
whole, results = digest(folder / "whole"), []
for dies_at in sorted(random.Random(0).sample(range(1, events + 1), deaths)):
    dst = folder / f"dst{dies_at}"
    code = in_child(dst, dies_at, facts)
    appeared = dst.exists()
    assert in_child(dst, 0, facts) == 0
    resumed = json.loads(facts.read_text())[1]
    leftovers = [path.name for path in folder.glob(f"dst{dies_at}.*")]
    results.append([code, appeared, digest(dst) == whole, resumed, leftovers])
print(json.dumps([events, results]))
"""


@pytest.mark.parametrize(("method", "deaths"), [("mse", 20), ("gptq", 5)])
def test_killed_at_random_moments_it_goes_on_to_the_same_files(tmp_path, method, deaths):
    """Every file is bit for bit that of an uninterrupted run: shards, sums, config and report."""
    config = small_config(num_experts=3)
    save_native(state(config), config, tmp_path / "src")
    with memory_folder() as folder:
        command = [sys.executable, "-c", KILLED, str(tmp_path / "src"), folder, method, str(deaths)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, check=True, capture_output=True, timeout=120, env=environment)
    events, results = json.loads(done.stdout)
    assert events > 60
    for code, _, same, _, leftovers in results:
        assert (code, same, leftovers) == (-9, True, [])
    assert not results[0][1]
    assert len({resumed for _, _, _, resumed, _ in results}) > deaths // 3


def test_the_same_command_again_keeps_what_is_whole(tmp_path, src):
    first = quantize_checkpoint(src, tmp_path / "dst", bits=4)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "dst").iterdir()}
    again = quantize_checkpoint(src, tmp_path / "dst", bits=4)
    assert again.written is None
    assert again.report == first.report
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "dst").iterdir()} == before
    with pytest.raises(CheckpointError, match=r"dst exists and is left as it is; .*--overwrite"):
        quantize_checkpoint(src, tmp_path / "dst", bits=8)
    assert quantize_checkpoint(src, tmp_path / "dst", bits=8, overwrite=True).written is not None
    assert open_checkpoint(tmp_path / "dst").precision.role_bits["experts"] == 8


# --- disk -------------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_an_error_of_ours_and_the_next_run_goes_on(tmp_path, src):
    """The largest file that this process may write is shorter than one of the shards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (22_000, hard))
    try:
        with pytest.raises(ResourceError, match=r"the disk is full: .*dst\.partial.*run the same command again"):
            quantize_checkpoint(src, tmp_path / "dst", bits=8, shard_bytes=SHARD_BYTES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "dst").exists()
    done = quantize_checkpoint(src, tmp_path / "dst", bits=8, shard_bytes=SHARD_BYTES, say=lambda _: None)
    assert done.written.resumed_shards > 0
    quantize_checkpoint(src, tmp_path / "at once", bits=8, shard_bytes=SHARD_BYTES)
    assert contents(tmp_path / "dst") == contents(tmp_path / "at once")


def test_too_small_a_disk_is_refused_before_anything_is_written(tmp_path, src, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(2**40, 2**40 - 2**20, 2**20))
    with pytest.raises(ResourceError, match=r"dst\.partial/checkpoint still needs 16\.\d MiB, 1\.00 MiB are free"):
        quantize_checkpoint(src, tmp_path / "dst", bits=4)
    assert [path.name for path in (tmp_path / "dst.partial" / "checkpoint").iterdir()] == ["manifest.json"]


# --- memory -----------------------------------------------------------------------------------------------------------

MEASURED = """
import json, re, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from yuanmoe.checkpoint.quantize.quantize import quantize_checkpoint

def status(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

large, small, folder = map(Path, sys.argv[1:])
quantize_checkpoint(small, folder / "small", bits=4)  # imports
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = status("VmRSS")
quantize_checkpoint(large, folder / "dst", bits=4, method="rtn")
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells a process its peak memory")
def test_memory_does_not_grow_with_the_checkpoint(tmp_path, src):
    """151 MB of weights, nearly all of them experts of one layer, pass through a part of that."""
    config = small_config(hidden_size=512, head_dim=256, num_experts=48, moe_intermediate_size=1024)
    config = config.replace(num_hidden_layers=1)
    large = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in layout(config).native.items()}
    for tensor in large.values():
        tensor.view(torch.int16).random_(0x3C00, 0x3D00)  # about 0.01
    save_native(large, config, tmp_path / "large")
    command = [sys.executable, "-c", MEASURED, *map(str, (tmp_path / "large", src, tmp_path))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, timeout=200, env=environment)
    assert int(done.stdout) < 64 * 2**20


SMAPS = """
import json, re, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from yuanmoe.checkpoint.load import load_model
ids = torch.tensor([3, 4, 5])

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

small, path = sys.argv[1:]
for folder in (small, path):  # the first one imports
    before = anonymous()
    model = load_model(folder)
    with torch.inference_mode():
        model.model(ids, model.new_cache(1, 3).extend([3]))
grown = anonymous() - before
maps, mine = Path("/proc/self/smaps").read_text().split("\\n"), {}
inside = False
for line in maps:
    if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
        inside = line.endswith("dst/model.safetensors")
    elif inside and (found := re.match(r"(Rss|Private_Dirty|Anonymous):\\s+(\\d+) kB", line)):
        mine[found[1]] = mine.get(found[1], 0) + int(found[2]) * 1024
print(json.dumps([grown, mine]))
"""


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells what memory is mapped files")
def test_weights_stay_in_the_page_cache(tmp_path, src):
    """Loaded and used, they are pages of the file, none of them a copy: processes share them."""
    config = small_config(hidden_size=256, head_dim=128, num_experts=8, moe_intermediate_size=512)
    save_native(state(config), config, tmp_path / "large")
    for source, name in ((src, "small"), (tmp_path / "large", "dst")):
        quantize_checkpoint(source, tmp_path / name, bits=8, method="rtn")
    command = [sys.executable, "-c", SMAPS, str(tmp_path / "small"), str(tmp_path / "dst")]
    done = subprocess.run(command, check=True, capture_output=True, timeout=60)
    grown, mapped = json.loads(done.stdout)
    size = (tmp_path / "dst" / "model.safetensors").stat().st_size
    assert mapped["Private_Dirty"] == mapped["Anonymous"] == 0
    assert mapped["Rss"] > 0.9 * size
    assert grown < 0.3 * size


def test_a_model_larger_than_memory_runs_and_says_what_that_costs(tmp_path, src, monkeypatch):
    quantize_checkpoint(src, tmp_path / "dst", bits=8)
    monkeypatch.setattr(load, "_free_memory", lambda device: 50_000)
    with pytest.warns(
        RuntimeWarning, match=r"dst take \d+ KiB, 48\.8 KiB of RAM are free: of the .* that a token reads"
    ):
        model = load_model(tmp_path / "dst")
    assert model.logits(model.model(random_ids(3), model.new_cache(1, 3).extend([3]))[0]).isfinite().all()
    monkeypatch.setattr(MappedBytes, "fault_rate", lambda self: 2e9)
    with pytest.warns(
        RuntimeWarning, match=r"s a token at the 2\.00 GB/s measured now; .*fewer bits: yuanmoe quantize"
    ):
        load_model(tmp_path / "dst")
    monkeypatch.setattr(MappedBytes, "fault_rate", lambda self: None)
    quantize_checkpoint(src, tmp_path / "four", bits=4)
    with pytest.warns(RuntimeWarning, match=r"s a token at the 1\.00 GB/s assumed; more memory helps$"):
        load_model(tmp_path / "four")


def test_the_rate_of_a_disk_is_measured(tmp_path):
    (tmp_path / "file").write_bytes(bytes(1 << 22))
    assert MappedBytes(tmp_path / "file").fault_rate() > 1e6


# --- damaged and strange ----------------------------------------------------------------------------------------------


def edit(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_a_flipped_bit_and_a_missing_shard_are_found(tmp_path, src):
    quantize_checkpoint(src, tmp_path / "dst", bits=4, shard_bytes=SHARD_BYTES)
    assert verify_checkpoint(tmp_path / "dst").hashed_bytes > 50_000
    shard = sorted((tmp_path / "dst").glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=rf"{shard.name} is damaged: its sha256 is [0-9a-f]{{64}}, manifest\.json"
    ):
        verify_checkpoint(tmp_path / "dst")
    shard.unlink()
    for call in (verify_checkpoint, load_model, open_checkpoint):
        with pytest.raises(CheckpointError, match=rf"{shard.name} is missing; model\.safetensors\.index\.json places"):
            call(tmp_path / "dst")


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (2, r"has version 2 of the layout of quantized weights, this package reads 1; update it"),
        (0, r"has version 0 of the layout of quantized weights, this package reads 1; quantize the weights again"),
        ("1", r"describes its quantization as .*'layout': '1'.*; it is damaged"),
        (None, r"it is damaged"),
    ],
)
def test_another_version_of_the_layout_is_refused(tmp_path, src, version, message):
    quantize_checkpoint(src, tmp_path / "dst", bits=4)
    edit(tmp_path / "dst", lambda config: config["quantization"].update(layout=version))
    for call in (verify_checkpoint, load_model):
        with pytest.raises(CheckpointError, match=message):
            call(tmp_path / "dst")


DAMAGE = {
    "bits": (lambda record: record["roles"].update(experts=5), r"describes its quantization as .* it is damaged"),
    "group": (lambda record: record.update(group_size=7), r"describes its quantization as .* it is damaged"),
    "another group": (lambda record: record.update(group_size=32), r"codes' is torch\.uint8 \[.*\]; its format needs"),
    "more roles": (
        lambda record: record["roles"].update(norms=8, router=8),
        r"tensor 'model\.layers\.0\.mlp\.router\.w",
    ),
    "fewer roles": (lambda record: record["roles"].pop("lfa"), r"tensor 'model\.layers\.0\.self_attn\.lfa\.conv1\.wei"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_record_that_is_not_of_these_files_is_an_error(tmp_path, src, change, message):
    quantize_checkpoint(src, tmp_path / "dst", bits=4)
    edit(tmp_path / "dst", lambda config: change(config["quantization"]))
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "dst")


def test_a_dtype_that_is_none_is_an_error_of_the_file(tmp_path, src):
    quantize_checkpoint(src, tmp_path / "dst", bits=4)
    edit(tmp_path / "dst", lambda config: config.update(dtype="int3"))
    with pytest.raises(ConfigError, match=r"dst/config\.json: unknown dtype 'int3'; known: float64"):
        load_model(tmp_path / "dst")


def test_a_source_that_cannot_be_quantized_is_refused(tmp_path, src):
    index = src / "pytorch_model.bin.index.json"
    places = json.loads(index.read_text())
    broken = shutil.copytree(src, tmp_path / "broken")
    name = "model.layers.1.mlp.experts.3.w2.weight"
    shard = places["weight_map"].pop(name)
    (broken / index.name).write_text(json.dumps(places))
    tensors = torch.load(broken / shard)
    del tensors[name]
    torch.save(tensors, broken / shard)
    with pytest.raises(CheckpointError, match=rf"tensor '{re.escape(name)}' is missing \(1 of \d+ in all\)"):
        quantize_checkpoint(broken, tmp_path / "dst", bits=4)
    edit(src, lambda config: config.update(surprise=1))
    with pytest.raises(ConfigError, match="unknown config key"):
        quantize_checkpoint(src, tmp_path / "dst", bits=4)
    quantize_checkpoint(src, tmp_path / "dst", bits=4, ignore_unknown=True)
    with pytest.raises(UsageError, match=r"dst is quantized already; quantize the checkpoint that it was made from"):
        quantize_checkpoint(tmp_path / "dst", tmp_path / "again", bits=8)
    with pytest.raises(UsageError, match="is or lies in the destination"):
        quantize_checkpoint(src, tmp_path, bits=4)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("method", ["rtn", "mse", "gptq"])
def test_weights_that_are_not_finite_are_named(tmp_path, method):
    damaged = state()
    damaged["model.layers.1.self_attn.v_proj.weight"][5, 6] = torch.inf
    save_native(damaged, CONFIG, tmp_path / "src")
    calibration = [3, 4, 5, 6] * 20 if method == "gptq" else []
    with pytest.raises(
        UsageError, match=r"^model\.layers\.1\.self_attn\.v_proj\.weight: 1 weights are not finite or too"
    ):
        quantize_checkpoint(tmp_path / "src", tmp_path / "dst", bits=4, method=method, calibration=calibration)
    assert not (tmp_path / "dst").exists()


def test_activations_that_are_not_finite_are_an_error(tmp_path):
    damaged = state()
    damaged["model.layers.0.input_layernorm.weight"][:] = 3e38  # finite, but what it is multiplied into is not
    save_native(damaged, CONFIG, tmp_path / "src")
    with pytest.raises(
        CheckpointError, match=r"activations of the calibration text are not finite: the weights or the"
    ):
        quantize_checkpoint(tmp_path / "src", tmp_path / "dst", bits=4, method="gptq", calibration=[3, 4, 5, 6] * 20)
