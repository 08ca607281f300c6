"""Damaged, hostile and mismatched checkpoint files: our own errors, which name the file and what is wrong with it."""

import json
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_writers import (
    official_json,
    official_state,
    random_state,
    write_bin,
    write_json,
    write_safetensors,
)
from small_models import small_config
from yuanmoe.checkpoint.files.safetensors_file import open_safetensors
from yuanmoe.checkpoint.formats.mapping import layout
from yuanmoe.checkpoint.load import load_model, load_state
from yuanmoe.checkpoint.open import open_checkpoint
from yuanmoe.checkpoint.write.save import save_native
from yuanmoe.errors import CheckpointError, ConfigError, ResourceError, UsageError
from yuanmoe.presets import preset

CONFIG = small_config(hidden_size=12, head_dim=12, intermediate_size=0, tie_word_embeddings=False)
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def official():
    return official_state(CONFIG, random_state(CONFIG))


@pytest.fixture
def safetensors_folder(tmp_path, official) -> Path:
    return write_safetensors(tmp_path / "st", official_json(CONFIG), official, shards=3)


@pytest.fixture
def bin_folder(tmp_path, official) -> Path:
    return write_bin(tmp_path / "bin", official_json(CONFIG), official, shards=3)


# --- safetensors ------------------------------------------------------------------------------------------------------


def header_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize("lost", [1, 1000])
def test_a_truncated_shard_is_named_with_its_sizes(safetensors_folder, lost):
    shard = sorted(safetensors_folder.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-lost])
    message = rf"{shard.name} is truncated: {len(whole)} bytes expected, {len(whole) - lost} there"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(safetensors_folder)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{", b"", "damaged header"),
        (b"[" * 100_000, b"", "damaged header"),
        ([1], b"", "no JSON object"),
        ({"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}}, b"1234", "unknown dtype 'F4'"),
        ({"a": {"dtype": "F32", "shape": [1]}}, b"", "the header is damaged"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234", "the header is damaged"),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"1234", "the header is damaged"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234", "needs 8 bytes, but its offsets"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12345678", "leaves a gap"),
        (
            {"a": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]}},
            b"1234",
            r"truncated: 4611686018427\d{6} bytes expected, 109 there",
        ),
        (
            {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"},
            b"1234",
            "'b' overlaps the one before",
        ),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12345", "not one whole file"),
    ],
)
def test_a_header_that_does_not_describe_its_file_is_refused(tmp_path, header, data, message):
    with pytest.raises(CheckpointError, match=message):
        open_safetensors(header_file(tmp_path / "x.safetensors", header, data))


def test_files_that_are_no_safetensors_are_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    for content, message in (
        (b"", "is empty"),
        (b"1234", "too few"),
        (b"\xff" * 16, "announce a header of"),
        (struct.pack("<Q", 50) + b"{}", "58 bytes expected, 10 there"),
    ):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            open_safetensors(file)
    with pytest.raises(CheckpointError, match=r"cannot open .*y\.safetensors: No such file"):
        open_safetensors(tmp_path / "y.safetensors")


# --- directories ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.05, 0.5, 0.999])
def test_a_truncated_pickle_shard_is_named(bin_folder, share):
    shard = sorted(bin_folder.glob("*.bin"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[: int(share * len(content))])
    with pytest.raises(
        CheckpointError, match=rf"{shard.name} is truncated or damaged .*{int(share * len(content))} bytes"
    ):
        open_checkpoint(bin_folder)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_missing_shard_is_named_with_what_it_held(request, kind):
    folder = request.getfixturevalue(f"{kind}_folder")
    shard = sorted(folder.glob(f"*.{kind}"))[1]
    shard.unlink()
    with pytest.raises(
        CheckpointError, match=rf"{shard.name} is missing; .*index\.json places \d+ of \d+ tensors in it"
    ):
        open_checkpoint(folder)
    next(folder.glob("*.index.json")).unlink()
    with pytest.raises(CheckpointError, match=rf"{shard.name} is missing, beside"):
        open_checkpoint(folder)


def test_a_tensor_that_is_not_where_the_index_says_is_named(safetensors_folder):
    shard = sorted(safetensors_folder.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    lost = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, shard)
    with pytest.raises(CheckpointError, match=rf"tensor '{lost}' is missing from .*{shard.name}"):
        open_checkpoint(safetensors_folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "no object 'weight_map'"),
        ({"weight_map": {"a": 1}}, "no object 'weight_map'"),
        ({"weight_map": {"a": "../../etc/passwd"}}, "outside its folder"),
        ([], "holds a list"),
    ],
)
def test_a_damaged_index_is_refused(safetensors_folder, index, message):
    write_json(safetensors_folder / "model.safetensors.index.json", index)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(safetensors_folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(NORM), rf"tensor '{NORM}' is missing \(1 of 93 in all\)"),
        (
            lambda state: state.update({NORM: torch.ones(13)}),
            rf"'{NORM}' has shape \(13,\), config.json describes \(12,\)",
        ),
        (lambda state: state.update({NORM: torch.ones(12).int()}), rf"'{NORM}' has dtype torch.int32"),
        (
            lambda state: state.update({"model.layers.0.mlp.bias": torch.ones(1)}),
            r"'model.layers.0.mlp.bias' is not part",
        ),
    ],
)
def test_tensors_that_are_not_the_models_are_named(tmp_path, official, change, message):
    count = len(official)
    change(official)
    with pytest.raises(CheckpointError, match=message.replace("93", str(count))):
        open_checkpoint(write_safetensors(tmp_path / "m", official_json(CONFIG), official))


def test_unknown_tensors_and_keys_can_be_ignored(tmp_path, official):
    official["model.layers.0.mlp.bias"] = torch.ones(1)
    folder = write_safetensors(tmp_path / "m", official_json(CONFIG, num_expert=4), official)
    source = open_checkpoint(folder, ignore_unknown=True)
    assert source.config == CONFIG
    assert source.tensors.keys() == layout(CONFIG).native.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_sise": 12}, r"unknown config key 'hidden_sise'; did you mean hidden_size\? .*--ignore-unknown"),
        ({"hidden_size": "12"}, "hidden_size is '12'; it must be an integer"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be an integer of at least 1"),
        ({"attention_projection_size": 25}, "attention_projection_size 25 is not 2 heads"),
        ({"attention_projection_size": None, "head_dim": 5.5}, "is not 2 heads of 5.5 channels"),
        ({"num_key_value_heads": 1}, "every head has its own keys"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu', 'swish'"),
        ({"causal_mask": False}, "causal_mask is False; supported: True"),
        ({"model_type": "llama"}, "model_type is 'llama'; supported: 'yuan'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling is"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn'; supported: 'default'"),
        ({"moe_config": None, "use_moe": True}, "use_moe is true, but moe_config"),
        ({"moe_config": [8]}, r"moe_config is \[8\]; it must be an object"),
        ({"moe_config": {"moe_num_experts": 8, "norm_topk_prob": False}}, "norm_topk_prob is False"),
        ({"moe_config": {"moe_num_expert": 8}}, "'moe_num_expert'; did you mean moe_num_experts"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000; .* allow 93 at most"),
        ({"moe_config": {"moe_num_experts": 10**12}}, "num_experts is 1000000000000; .* allow 32 at most"),
        ({"yuanmoe": {"router": "linaer"}}, "router is 'linaer'"),
        ({"eod_token": 99}, "eod_token_id 99 is outside the vocabulary of 32"),
    ],
)
def test_configurations_of_no_or_another_model_are_refused(tmp_path, official, changes, message):
    folder = write_safetensors(tmp_path / "m", official_json(CONFIG, **changes), official)
    message = f"^{re.escape(str(folder / 'config.json'))}: .*{message}"
    with pytest.raises(ConfigError, match=message.replace("93", str(len(official)))):
        open_checkpoint(folder)


def test_paths_that_are_no_checkpoints_are_refused(tmp_path, official):
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "a.bin").write_text("x")
    with pytest.raises(CheckpointError, match=r"a\.bin is a file; give its directory"):
        open_checkpoint(tmp_path / "a.bin")
    (tmp_path / "a.bin").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        open_checkpoint(tmp_path)
    write_json(tmp_path / "config.json", official_json(CONFIG))
    with pytest.raises(CheckpointError, match=r"holds no weights: looked for model\.safetensors"):
        open_checkpoint(tmp_path)
    for name in "ab":
        save_file(official, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"several weight files, a\.safetensors, b\.safetensors"):
        open_checkpoint(tmp_path)


def test_damaged_native_directories_are_refused(tmp_path):
    folder = tmp_path / "n"
    save_native(random_state(CONFIG), CONFIG, folder)
    values = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", values | {"version": 2})
    with pytest.raises(CheckpointError, match="has version 2 of the native format, this package reads version 1"):
        open_checkpoint(folder)
    write_json(folder / "config.json", values | {"model": None})
    with pytest.raises(ConfigError, match="needs an object 'model'"):
        open_checkpoint(folder)
    write_json(folder / "config.json", values | {"model": values["model"] | {"num_experts": [10**12, 8]}})
    with pytest.raises(ConfigError, match=r"num_experts is \[1000000000000, 8\]"):
        open_checkpoint(folder)
    write_json(folder / "config.json", values | {"model": values["model"] | {"hidden_size": 14}})
    with pytest.raises(
        CheckpointError, match=r"'model.embed_tokens.weight' has shape \(32, 12\), config.json describes"
    ):
        open_checkpoint(folder)


# --- memory -----------------------------------------------------------------------------------------------------------


def m32_of_nothing(folder: Path) -> Path:
    """All of M32 in the official layout, 80 GB of zeros that take no room on the disk."""
    folder.mkdir()
    write_json(folder / "config.json", official_json(preset("m32")))
    header, start = {}, 0
    for name, shape in layout(preset("m32")).official.items():
        stop = start + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, stop]}
        start = stop
    file = header_file(folder / "model.safetensors", header)
    with file.open("r+b") as sparse:
        sparse.truncate(file.stat().st_size + start)
    return folder


def test_opening_reads_no_weights_and_loading_says_when_they_do_not_fit(tmp_path, monkeypatch):
    source = open_checkpoint(m32_of_nothing(tmp_path / "m"))
    assert source.config == preset("m32", initializer_range=0.02)
    assert sum(tensor.numel for tensor in source.tensors.values()) == 39_942_842_368
    experts = source.tensors["model.layers.23.mlp.experts.gate_up_proj"]
    assert experts.shape == (32, 16384, 2048)
    assert not experts.rows(31, 32).any()
    free = 24 * 2**30
    monkeypatch.setattr("yuanmoe.checkpoint.load._free_memory", lambda device: free)
    with pytest.raises(
        ResourceError, match=r"in bfloat16 needs 73\.\d GiB of RAM, 24\.0 GiB are free.*yuanmoe convert"
    ):
        load_state(source)
    with pytest.raises(ResourceError, match=r"in float32 needs 149 GiB of RAM"):
        load_state(source, dtype=torch.float32)


def test_values_beyond_a_dtype_are_an_error(tmp_path, official):
    official[NORM][3] = 1e6
    source = open_checkpoint(write_safetensors(tmp_path / "m", official_json(CONFIG), official))
    with pytest.raises(
        CheckpointError, match=rf"{NORM} reaches 1e\+06, beyond the 6\.55e\+04 that torch.float16 holds"
    ):
        load_state(source, dtype=torch.float16)
    assert load_state(source, dtype=torch.bfloat16)[NORM][3] == torch.tensor(1e6).bfloat16()


def test_changes_that_do_not_fit_the_weights_are_refused(tmp_path, official):
    folder = write_safetensors(tmp_path / "m", official_json(CONFIG), official)
    with pytest.raises(UsageError, match="num_experts cannot be changed while loading"):
        load_model(folder, num_experts=4)
    with pytest.raises(ConfigError, match="unknown config key 'rope_tetha'; did you mean rope_theta"):
        load_model(folder, rope_tetha=40890.0)
