"""transformers over our modules: the released arithmetic, and official directories in and out."""

import importlib.metadata
import importlib.util
import itertools
import json
import logging
import re

import pytest

pytest.importorskip("transformers", reason="the extra `hf` is not installed")

import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

import yuanmoe.hosts.hf
from checkpoint_writers import (
    EMBEDDING,
    HEAD,
    official_json,
    official_state,
    random_state,
    write_bin,
    write_safetensors,
)
from small_models import VARIANTS, random_ids, small_config
from yuanmoe.checkpoint.formats.mapping import layout
from yuanmoe.checkpoint.formats.official_config import official_config
from yuanmoe.checkpoint.open import open_checkpoint
from yuanmoe.errors import CheckpointError, ConfigError, MissingExtraError
from yuanmoe.hosts.hf import YuanConfig, YuanForCausalLM
from yuanmoe.model.decoder import CausalLM as NativeModel

load = AutoModelForCausalLM.from_pretrained
MOE = small_config(num_experts=4, tie_word_embeddings=True)
GOLDEN = ("moe-tiny", "moe-32x2", "dense-tiny")


def new_model(config=MOE) -> YuanForCausalLM:
    return YuanForCausalLM(YuanConfig(**official_config(config, torch.float32)))


def relative(ours, theirs) -> float:
    """The largest difference in units of the logits' spread."""
    return ((ours - theirs).abs().max() / theirs.std()).item()


def clear_tokens(model, ids) -> torch.Tensor:
    """The tokens before which no route is closer than rounding: there another order of sums chooses other experts."""
    routers = model(ids, output_router_logits=True).router_logits
    unclear = torch.zeros(ids.shape, dtype=torch.bool)
    for logits in routers:
        ranked = logits.view(*ids.shape, -1).sort(dim=-1, descending=True).values
        unclear |= ranked[..., 1] - ranked[..., 2] < 1e-6
    return unclear.cummax(dim=1).values.logical_not().roll(1, dims=1).index_fill(1, torch.tensor([0]), True)


# --- the released arithmetic ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.usefixtures("exact_weights")
@torch.no_grad()
def test_golden_checkpoints_open_compute_generate_and_are_saved_as_they_were(golden, tmp_path, name):
    folder = golden / name
    expected = load_file(folder / "expected.safetensors")
    model = load(folder)
    assert type(model.config) is YuanConfig
    assert not model.training
    out = model(expected["input_ids"], output_router_logits=True, output_hidden_states=True)
    assert relative(out.logits, expected["logits"]) < 1e-4
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    assert relative(out.hidden_states[-1], expected["last_hidden"]) < 1e-4
    if "router_logits" in expected:
        torch.testing.assert_close(torch.stack(out.router_logits), expected["router_logits"].flatten(1, 2))
    else:
        assert out.router_logits == ()
    prompt = expected["greedy"][:, :7]
    said = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, eos_token_id=None)
    clear = clear_tokens(model, expected["greedy"])
    assert clear.float().mean() > 0.5, "too few clear routes to compare"
    assert torch.equal(said[clear], expected["greedy"][clear])
    model.save_pretrained(tmp_path)
    assert_same_tensors(load_file(tmp_path / "model.safetensors"), load_file(folder / "model.safetensors"))
    before, after = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path))
    changed = {key for key in before if after.get(key) != before[key]}
    assert changed == {"auto_map", "transformers_version"}
    assert set(after) - set(before) == {"dtype"}


@pytest.mark.parametrize(
    ("change", "ids", "logits"),
    [
        ({"rope_theta": 40890.0}, "input_ids", "logits_base_40890"),
        ({"yuanmoe": {"rope_angles": "bfloat16"}}, "input_ids", "logits_bf16_rope"),
        ({"yuanmoe": {"packing": "hf-mask"}}, "packed_input_ids", "packed_logits"),
    ],
)
@torch.no_grad()
def test_named_modes_are_keywords_of_from_pretrained(golden, change, ids, logits):
    folder = golden / "moe-tiny"
    expected = load_file(folder / "expected.safetensors")
    assert relative(load(folder, **change)(expected[ids]).logits, expected[logits]) < 1e-4


# --- official directories ---------------------------------------------------------------------------------------------


def assert_same_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_architecture_round_trips_and_is_the_native_model(tmp_path, variant):
    config = small_config(**VARIANTS[variant])
    model = new_model(config).eval()
    assert model.config.to_native() == config
    model.save_pretrained(tmp_path)
    ours = {name: model.state_dict()[name] for name in layout(config).native}
    assert set(model.state_dict()) - set(ours) <= {HEAD}, "only a tied head has a second name"
    assert_same_tensors(load_file(tmp_path / "model.safetensors"), official_state(config, ours))
    source = open_checkpoint(tmp_path)
    assert source.config == config
    assert_same_tensors({name: tensor.read() for name, tensor in source.tensors.items()}, ours)
    native = NativeModel(config)
    native.load_state_dict(ours)
    ids = random_ids(2, 7)
    with torch.no_grad():
        expected = native(ids)
        assert torch.equal(load(tmp_path)(ids).logits, expected.logits)
        assert torch.equal(AutoModel.from_pretrained(tmp_path)(ids).last_hidden_state, expected.hidden)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}, {"device_map": "auto", "low_cpu_mem_usage": True}])
def test_sharded_pickles_as_released(tmp_path, dense, options):
    config = small_config(num_experts=0) if dense else MOE
    state = random_state(config, torch.bfloat16)
    official = official_state(config, state) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    write_bin(tmp_path, official_json(config), official, shards=3)
    model, info = load(tmp_path, output_loading_info=True, **options)
    assert not any(info.values())
    assert model.dtype == torch.bfloat16
    assert_same_tensors({name: model.state_dict()[name] for name in state}, state)
    assert load(tmp_path, dtype=torch.float32, **options).dtype == torch.float32
    model.save_pretrained(tmp_path / "again", max_shard_size="4KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    assert_same_tensors(load(tmp_path / "again").state_dict(), model.state_dict())


@pytest.mark.parametrize("says_tied", [True, False, None])
@pytest.mark.parametrize("head", ["absent", "alias", "copy", "other"])
def test_a_head_that_is_absent_aliased_duplicated_or_its_own(tmp_path, head, says_tied):
    official = official_state(MOE, random_state(MOE, torch.bfloat16))
    embedding = official[EMBEDDING]
    heads = {"alias": embedding, "copy": embedding.clone(), "other": torch.randn_like(embedding)}
    said = {} if says_tied is None else {"tie_word_embeddings": says_tied}
    write_bin(tmp_path, official_json(MOE, **said), official | ({HEAD: heads[head]} if head != "absent" else {}))
    model = load(tmp_path)
    tied = head == "absent" or (head != "other" and says_tied is not False)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied == model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight, heads.get(head, embedding))
    model.save_pretrained(tmp_path / "again")
    assert_same_tensors(load(tmp_path / "again").state_dict(), model.state_dict())


@pytest.fixture
def folders(tmp_path):
    """New folders, one after the other."""
    return (tmp_path / str(number) for number in itertools.count())


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("layers.1.mlp.experts.2.w1", r"layer 1: mlp\.experts\.gate_up_proj is made of 4 tensors .* files hold 3 of"),
        (
            "layers.0.self_attn.k_proj",
            r"layer 0: self_attn\.q_proj\.weight, self_attn\.k_proj\.weight .* files hold 1 of",
        ),
    ],
)
@pytest.mark.parametrize("shape", [None, (3, 16)])
def test_parts_that_do_not_make_a_tensor_are_reported(folders, caplog, monkeypatch, part, said, shape):
    official = official_state(MOE, random_state(MOE))
    name = next(name for name in official if part in name)
    whole = official.pop(name)
    if shape is not None:
        official[name] = whole.new_ones(shape)
        said = r"is made of \d tensors .*; the files hold \d of \[\(3, 16\)"
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with pytest.raises(RuntimeError, match="above report"):
        load(write_safetensors(next(folders), official_json(MOE), official))
    assert re.search(said, caplog.text)


def test_what_cannot_be_loaded_is_refused(folders):
    official = official_state(MOE, random_state(MOE))
    without = {name: tensor for name, tensor in official.items() if "layers.1.self_attn.v_proj" not in name}
    with pytest.raises(
        CheckpointError, match=r"lacks 1 tensors .* model\.layers\.1\.self_attn\.v_proj\.weight; the files"
    ):
        load(write_safetensors(next(folders), official_json(MOE), without))
    folder = write_safetensors(next(folders), official_json(MOE, rotary_percentage=0.5), official)
    with pytest.raises(ConfigError, match=r"unknown config key 'rotary_percentage'.*ignore_unknown=True"):
        load(folder)
    assert load(folder, ignore_unknown=True).config.rotary_percentage == 0.5
    with pytest.raises(ConfigError, match="num_key_value_heads is 1"):
        load(write_safetensors(next(folders), official_json(MOE, num_key_value_heads=1), official))
    packing = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    with pytest.raises(ConfigError, match=r"GPTQ weights of 4 bits, .*: yuanmoe convert"):
        load(write_safetensors(next(folders), official_json(MOE, quantization_config=packing), official))


def test_transformers_that_is_missing_or_too_old_is_named(monkeypatch):
    def import_again():
        spec = importlib.util.spec_from_file_location("hf_again", yuanmoe.hosts.hf.__file__)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))

    monkeypatch.setattr(importlib.metadata, "version", lambda _: "4.57.1")
    with pytest.raises(
        MissingExtraError, match=r"needs transformers 5\.17, 4\.57\.1 is installed: pip install .yuanmoe\[hf\]"
    ):
        import_again()

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(ImportError, match=r"needs transformers, which is not installed: pip install .yuanmoe\[hf\]"):
        import_again()
