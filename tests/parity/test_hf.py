"""transformers over our modules: official directories in and out, the released arithmetic, training, PEFT."""

import importlib.metadata
import importlib.util
import itertools
import json
import logging
import re
from dataclasses import replace

import pytest

pytest.importorskip("transformers", reason="the extra `hf` is not installed")

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache

import yuanmoe.hf
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
from yuanmoe.checkpoint.mapping import layout
from yuanmoe.checkpoint.official_config import official_config
from yuanmoe.checkpoint.store import open_checkpoint
from yuanmoe.errors import CheckpointError, ConfigError, MissingExtraError, UsageError
from yuanmoe.hf import YuanConfig, YuanForCausalLM
from yuanmoe.model.decoder import YuanForCausalLM as NativeModel

# transformers warns of names that it renamed while PEFT and older versions still need them.
pytestmark = pytest.mark.filterwarnings("ignore:.*(gradient|activation)_checkpointing:FutureWarning")

load = AutoModelForCausalLM.from_pretrained
MOE = small_config(num_experts=4, tie_word_embeddings=True)
GOLDEN = ("moe-tiny", "moe-32x2", "dense-tiny")


def new_model(config=MOE) -> YuanForCausalLM:
    return YuanForCausalLM(YuanConfig(**official_config(config, torch.float32)))


def relative(ours, theirs) -> float:
    """The largest difference in units of the logits' spread."""
    return ((ours - theirs).abs().max() / theirs.std()).item()


# --- the released arithmetic ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
@torch.no_grad()
def test_golden_checkpoints_open_compute_generate_and_are_saved_as_they_were(shared_dir, tmp_path, name):
    folder = shared_dir / "golden" / name
    expected = load_file(folder / "expected.safetensors")
    model = load(folder)
    assert type(model.config) is YuanConfig
    assert not model.training
    out = model(expected["input_ids"], output_router_logits=True, output_hidden_states=True)
    assert relative(out.logits, expected["logits"]) < 1e-4
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    assert relative(out.hidden_states[-1], expected["last_hidden"]) < 1e-4
    routes = torch.stack(out.router_logits) if out.router_logits else torch.empty(0)
    torch.testing.assert_close(routes, expected.get("router_logits", routes).flatten(1, -2) if len(routes) else routes)
    prompt = expected["greedy"][:, :7]
    said = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, eos_token_id=None)
    assert torch.equal(said, expected["greedy"])
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
def test_named_modes_are_keywords_of_from_pretrained(shared_dir, change, ids, logits):
    folder = shared_dir / "golden" / "moe-tiny"
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
        spec = importlib.util.spec_from_file_location("hf_again", yuanmoe.hf.__file__)
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


# --- what transformers may ask of a model -----------------------------------------------------------------------------


def test_new_models_have_the_published_random_weights():
    torch.manual_seed(0)
    model = new_model(small_config(hidden_size=64, num_experts=8, tie_word_embeddings=False))
    state = model.state_dict()
    assert all(torch.all(tensor == 1) for name, tensor in state.items() if name.endswith("norm.weight"))
    for part, std in (
        ("embed", 0.3),
        ("lm_head", 0.3),
        ("q_proj", 0.3),
        ("router", 0.3),
        ("o_proj", 0.15),
        ("down_proj", 0.15),
    ):
        values = torch.cat([tensor.flatten() for name, tensor in state.items() if part in name])
        assert values.std().item() == pytest.approx(std, rel=0.1), part
    assert state["model.layers.0.self_attn.lfa.conv1.weight"].abs().max() <= 128**-0.5


def test_logits_to_keep_loss_and_outputs():
    model = new_model().eval()
    ids = random_ids(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    labels = ids.masked_fill(mask == 0, -100)
    out = model(ids, attention_mask=mask, labels=labels, output_router_logits=True)
    logits = out.logits
    torch.testing.assert_close(out.loss, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))
    kept = torch.tensor([[0, 5], [3, 2]])
    for keep, expected in (
        (2, logits[:, -2:]),
        (torch.tensor([1, 3]), logits[:, [1, 3]]),
        (kept, torch.stack([logits[0, kept[0]], logits[1, kept[1]]])),
        (mask == 1, logits[mask == 1]),
    ):
        torch.testing.assert_close(model(ids, attention_mask=mask, logits_to_keep=keep).logits, expected)
    assert [tuple(route.shape) for route in out.router_logits] == [(12, 4)] * 2
    assert torch.equal(out.router_logits[0].view(2, 6, 4)[1, :2], torch.zeros(2, 4)), "zero at padding"
    as_tuple = model(ids, attention_mask=mask, return_dict=False)
    assert torch.equal(as_tuple[0], logits)
    model.config.router_aux_loss_coef = 0.5
    balanced = model(ids, attention_mask=mask, labels=labels, output_router_logits=True)
    torch.testing.assert_close(balanced.loss, out.loss + 0.5 * out.aux_loss)
    assert out.aux_loss >= 1, "the loss of perfectly balanced experts is their number times 2 / number / 2"


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant):
    model = new_model().train()
    ids = random_ids(2, 6)

    def gradients():
        model.zero_grad()
        out = model(ids, labels=ids, output_router_logits=True)
        (out.loss + out.aux_loss).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = gradients()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    calls = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    assert_same_tensors(gradients(), expected)
    assert len(calls) == 2
    with pytest.raises(UsageError, match="takes no past_key_values"):
        model(ids, past_key_values=DynamicCache(config=model.config))


def test_embeddings_can_be_resized(tmp_path):
    for tied in (True, False):
        model = new_model(small_config(tie_word_embeddings=tied)).eval()
        ids = random_ids(1, 5)
        before = model(ids).logits
        model.resize_token_embeddings(40, mean_resizing=False)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        after = model(ids, labels=ids)
        assert after.logits.shape[-1] == 40
        torch.testing.assert_close(after.logits[..., :32], before)
        model.save_pretrained(tmp_path)
        again = load(tmp_path)
        assert again.config.to_native().vocab_size == 40
        assert torch.equal(again(ids).logits, after.logits)


def test_what_this_model_does_not_do_is_refused():
    model = new_model().eval()
    ids = random_ids(2, 6)
    with pytest.raises(UsageError, match="output_attentions cannot be true"):
        model(ids, output_attentions=True)
    with pytest.raises(UsageError, match="give either input_ids or inputs_embeds"):
        model()
    with pytest.raises(
        UsageError, match=r"attention_mask has shape \(2, 5\); 2 rows of 0 cached and 6 new tokens need \(2, 6\)"
    ):
        model(ids, attention_mask=torch.ones(2, 5))
    with pytest.raises(UsageError, match="hides all 2 x 6 tokens"):
        model(ids, attention_mask=torch.zeros(2, 6), use_cache=False)
    with pytest.raises(UsageError, match=r"DynamicCache \(no layers\), .*pass DynamicCache\(config=model\.config\)"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(UsageError, match="StaticCache"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")
    offloaded = DynamicCache(config=model.config)
    offloaded.offloading = True  # the constructor needs a GPU for it
    with pytest.raises(UsageError, match="an offloaded cache does not keep the filters' state"):
        model(ids, past_key_values=offloaded)
    with pytest.raises(ValueError, match="does not support Flash Attention 2"):
        model.set_attn_implementation("flash_attention_2")
    for packing, padding in (("megatron", "not defined for padded rows"), ("isolated", "give input_ids")):
        packed = new_model(replace(MOE, packing=packing))
        embeds = packed.get_input_embeddings()(ids)
        arguments = {"input_ids": ids} if packing == "megatron" else {"inputs_embeds": embeds}
        with pytest.raises(UsageError, match=padding):
            packed(**arguments, attention_mask=torch.tensor([[0] * 3 + [1] * 3] * 2))


@torch.no_grad()
def test_packing_restarts_documents_in_training_and_not_in_generation():
    ids = torch.tensor([[5, 6, 0, 7, 8, 9]])  # 0 is <eod>
    state = random_state(MOE)
    for packing in ("continuous", "megatron", "hf-mask", "isolated"):
        native = NativeModel(replace(MOE, packing=packing))
        native.load_state_dict(state)
        model = new_model(native.config)
        model.load_state_dict(state, strict=False)
        expected = native(ids).logits
        torch.testing.assert_close(model.eval()(ids).logits, expected)
        assert model(ids).past_key_values is None or packing == "continuous"
        if packing == "isolated":
            padded = torch.cat([torch.ones(1, 2, dtype=torch.long), ids], dim=1)
            mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
            torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 2:], expected)


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "conv1", "conv2"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["v_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ],
)
def test_lora_trains_is_saved_loaded_and_merged_into_official_files(tmp_path, targets):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, ids = new_model(), random_ids(2, 6)
    model.save_pretrained(tmp_path / "base")
    before = model(ids).logits
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **targets)
    adapted = peft.get_peft_model(model, config)
    out = adapted(ids, labels=ids)
    out.loss.backward()
    trained = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all(gradient is not None and gradient.any() for gradient in trained.values())
    if "target_parameters" in targets:
        assert any(".mlp.experts.lora_A" in name for name in trained)
    assert not torch.allclose(out.logits, before, atol=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter").eval()
    expected = adapted.eval()(ids).logits
    assert torch.equal(again(ids).logits, expected)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(load(tmp_path / "merged")(ids).logits, merged(ids).logits)
