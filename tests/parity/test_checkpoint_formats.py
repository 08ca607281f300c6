"""Every released format, opened, gives the weights that were written into it, bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_writers import (
    EMBEDDING,
    HEAD,
    official_json,
    official_state,
    pack_gptq,
    random_state,
    write_bin,
    write_gptq,
    write_json,
    write_megatron,
    write_safetensors,
)
from small_models import small_config
from yuanmoe.checkpoint.files.lazy import TensorView
from yuanmoe.checkpoint.formats.gptq import GPTQTensor, packed_tensors
from yuanmoe.checkpoint.formats.mapping import layout
from yuanmoe.checkpoint.load import load_model, load_state
from yuanmoe.checkpoint.open import open_checkpoint
from yuanmoe.checkpoint.write.convert import convert_checkpoint
from yuanmoe.checkpoint.write.save import save_native, save_official
from yuanmoe.presets import PRESETS, preset

MOE = small_config(tie_word_embeddings=False, intermediate_size=0)
DENSE = small_config(num_experts=0, moe_intermediate_size=0, tie_word_embeddings=False, partial_rotary_factor=1.0)
# The released layout has no key for it: hidden / heads channels of a head rotate.
MOE, DENSE = (config.replace(hidden_size=12, head_dim=head_dim) for config, head_dim in ((MOE, 12), (DENSE, 6)))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("config", [MOE, DENSE], ids=["moe", "dense"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("write", [write_safetensors, write_bin])
def test_official_directories_open_as_the_model_they_hold(tmp_path, config, shards, write):
    state = random_state(config, torch.bfloat16)
    source = open_checkpoint(write(tmp_path / "m", official_json(config), official_state(config, state), shards))
    assert source.config == config
    assert source.format == "official"
    assert source.dtype == torch.bfloat16
    assert {name: tensor.shape for name, tensor in source.tensors.items()} == layout(config).native
    assert_same(load_state(source), state)


@pytest.mark.parametrize("write", [write_safetensors, write_bin])
def test_shards_without_an_index_are_read_together(tmp_path, write):
    state = random_state(MOE)
    folder = write(tmp_path / "m", official_json(MOE), official_state(MOE, state), shards=2)
    next(folder.glob("*.index.json")).unlink()
    assert_same(load_state(open_checkpoint(folder)), state)


@pytest.mark.parametrize("head", ["absent", "aliased", "duplicated"])
def test_a_head_that_is_the_embedding_is_tied_whatever_the_config_says(tmp_path, head):
    config = MOE.replace(tie_word_embeddings=True)
    state = random_state(config)
    official = official_state(config, state)
    if head != "absent":
        official[HEAD] = official[EMBEDDING] if head == "aliased" else official[EMBEDDING].clone()
    source = open_checkpoint(write_bin(tmp_path / "m", official_json(MOE, tie_word_embeddings=False), official))
    assert source.config == config
    assert_same(load_state(source), state)
    save_official(source, source.config, tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert_same(again, official)
    assert open_checkpoint(tmp_path / "again").config == config


def test_parameters_and_strided_tensors_in_pickles_are_read_as_they_are(tmp_path):
    state = random_state(DENSE)
    official = official_state(DENSE, state)
    name = "model.layers.0.mlp.down_proj.weight"
    official[name] = official[name].T.contiguous().T
    official["model.norm.weight"] = torch.nn.Parameter(official["model.norm.weight"])
    official["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    folder = write_bin(tmp_path / "m", official_json(DENSE), official)
    assert not torch.load(folder / "pytorch_model.bin")[name].is_contiguous()
    assert_same(load_state(open_checkpoint(folder)), state)


@pytest.mark.parametrize(("bits", "cuts"), [(4, ()), (4, (0.001, 0.5)), (8, (0.3333, 0.61, 0.9))])
def test_gptq_pieces_are_one_file_and_dequantize_as_the_formula_says(tmp_path, bits, cuts):
    config = MOE.replace(hidden_size=16, num_attention_heads=2, head_dim=16, moe_intermediate_size=16)
    official = official_state(config, random_state(config))
    expected = write_gptq(tmp_path / "m", official_json(config), official, bits, cuts)
    source = open_checkpoint(tmp_path / "m")
    assert source.format == "gptq"
    assert source.dtype == torch.float16
    save_official(source, source.config, tmp_path / "plain")
    assert_same(load_file(tmp_path / "plain" / "model.safetensors"), expected)
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    packed = source.stored["model.layers.1.mlp.experts.7.w1.weight"]
    assert isinstance(packed, GPTQTensor)
    assert packed.qweight.read().shape == (16 * bits // 32, 32)


def test_gptq_follows_g_idx(tmp_path):
    parts, expected = pack_gptq(torch.empty(32, 24), 4, group=8, g_idx=torch.randperm(24) % 3)
    lazy = {f"x.{name}": TensorView.of(part) for name, part in parts.items()}
    (weight,) = packed_tensors(lazy, {"bits": 4}).values()
    assert torch.equal(weight.read(), expected)
    assert torch.equal(weight.rows(5, 9), expected[5:9])


@pytest.mark.parametrize("beside", [False, True], ids=["args", "config.json"])
@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_megatron_stages_are_renumbered_and_transposed(tmp_path, kind, beside):
    config = (MOE if kind == "moe" else DENSE).replace(num_hidden_layers=4, tie_word_embeddings=True)
    if not beside:  # Megatron's settings do not name <eod>: only the released ids are right
        config = config.replace(vocab_size=77200, eod_token_id=77185, sep_token_id=77187, pad_token_id=77185)
    state = random_state(config, torch.bfloat16)
    folder = write_megatron(tmp_path / "m", config, state, stages=2)
    if beside:
        write_json(folder / "config.json", official_json(config))
    source = open_checkpoint(folder)
    assert source.format == "megatron"
    assert source.config == config.replace(initializer_range=source.config.initializer_range)
    assert_same(load_state(source), state)
    if not beside:
        assert_same(load_state(open_checkpoint(folder / "iter_0001477")), state)


def test_rows_of_a_stack_are_single_experts(tmp_path):
    state = random_state(MOE)
    source = open_checkpoint(write_safetensors(tmp_path / "m", official_json(MOE), official_state(MOE, state)))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    for expert in range(8):
        assert torch.equal(source.tensors[name].rows(expert, expert + 1)[0], state[name][expert])
    blocks = list(source.tensors[name].blocks())
    assert [len(block) for block in blocks] == [state[name][0].numel()] * 8


def test_every_preset_has_the_number_of_weights_that_was_published():
    published = {"m32": 39_942_842_368, "2b": 2_088_724_480, "51b": 51_842_105_344, "102b": 102_577_954_816}
    for name, count in published.items():
        table = layout(preset(name))
        for shapes in (table.native, table.official):
            assert sum(torch.Size(shape).numel() for shape in shapes.values()) == count
    assert len(layout(preset("m32", tie_word_embeddings=False)).official) == 1875
    assert {name for name in PRESETS if not preset(name).is_moe} == {"yuan2-2b", "yuan2-51b", "yuan2-102b"}


def test_transformers_own_library_reads_what_we_write(tmp_path):
    state = random_state(MOE, torch.bfloat16)
    (tmp_path / "tokenizer.json").write_text("{}")
    save_native(state, MOE, tmp_path / "native", shard_bytes=10_000, companions=tmp_path)
    assert (tmp_path / "native" / "tokenizer.json").read_text() == "{}"
    files = sorted((tmp_path / "native").glob("*.safetensors"))
    assert len(files) == 3
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert_same(found, state)


def test_a_native_checkpoint_is_mapped_and_writing_to_it_changes_no_file(tmp_path):
    state = random_state(MOE)
    save_native(state, MOE, tmp_path / "native")
    content = (tmp_path / "native" / "model.safetensors").read_bytes()
    source = open_checkpoint(tmp_path / "native")
    assert all(tensor.is_view for tensor in source.tensors.values())
    model = load_model(tmp_path / "native")
    with torch.no_grad():
        model.model.norm.weight.fill_(7)
    assert (tmp_path / "native" / "model.safetensors").read_bytes() == content
    assert torch.equal(load_model(tmp_path / "native").model.norm.weight, state["model.norm.weight"])


def test_a_model_loads_in_another_dtype_and_with_another_rope_base(tmp_path):
    state = random_state(MOE)
    folder = write_safetensors(tmp_path / "m", official_json(MOE), official_state(MOE, state))
    model = load_model(folder, dtype=torch.bfloat16, rope_theta=40890.0)
    assert model.config.rope_theta == 40890.0
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == dict.fromkeys(state, torch.bfloat16)
    assert torch.equal(model.model.embed_tokens.weight, state[EMBEDDING].bfloat16())
    assert not model.training


def test_conversion_takes_dtype_rope_base_and_the_small_files_along(tmp_path):
    folder = write_bin(tmp_path / "m", official_json(MOE), official_state(MOE, random_state(MOE)), shards=2)
    for name in ("tokenizer.model", "generation_config.json", "secret.txt"):
        (folder / name).write_text(name)
    convert_checkpoint(folder, tmp_path / "n", dtype=torch.bfloat16, rope_theta=40890.0)
    source = open_checkpoint(tmp_path / "n")
    assert source.dtype == torch.bfloat16
    assert source.config == MOE.replace(rope_theta=40890.0)
    assert json.loads((tmp_path / "n" / "config.json").read_text())["dtype"] == "bfloat16"
    names = {path.name for path in (tmp_path / "n").iterdir()}
    assert names == {"config.json", "model.safetensors", "manifest.json", "tokenizer.model", "generation_config.json"}
    convert_checkpoint(tmp_path / "n", tmp_path / "o", to="official")
    values = json.loads((tmp_path / "o" / "config.json").read_text())
    assert values["rope_theta"] == 40890.0
    assert values["reset_position_ids"] is True
    assert values["torch_dtype"] == "bfloat16"


def test_golden_checkpoints_come_back_bit_for_bit(tmp_path, golden):
    for name in ("moe-tiny", "moe-32x2", "dense-tiny"):
        source, again = golden / name, tmp_path / f"{name}-again"
        convert_checkpoint(source, tmp_path / name, shard_bytes=1_000_000)
        convert_checkpoint(tmp_path / name, again, to="official")
        found, expected = (load_file(folder / "model.safetensors") for folder in (again, source))
        assert_same(found, expected)
        configs = [json.loads((folder / "config.json").read_text()) for folder in (again, source)]
        assert configs[0] == configs[1]


def test_experts_of_different_dtypes_meet_without_loss(tmp_path):
    state = random_state(MOE, torch.bfloat16)
    official = official_state(MOE, state)
    name = "model.layers.0.mlp.experts.3.w1.weight"
    official[name] = torch.randn(official[name].shape)
    write_safetensors(tmp_path / "m", official_json(MOE), official)
    stack = open_checkpoint(tmp_path / "m").tensors["model.layers.0.mlp.experts.gate_up_proj"].read()
    assert stack.dtype == torch.float32
    assert torch.equal(stack[3], official[name])
    assert torch.equal(stack[2].bfloat16(), official["model.layers.0.mlp.experts.2.w1.weight"])
