"""ModelConfig: what it refuses, in which words, and that it survives a trip through JSON."""

import json

import pytest
from hypothesis import given

from small_models import VARIANTS, configs, small_config
from yuanmoe.config import ModelConfig
from yuanmoe.errors import ConfigError
from yuanmoe.presets import ALIASES, PRESETS, preset

WRONG = [
    ({"vocab_size": 0}, "vocab_size is 0; it must be at least 1"),
    ({"hidden_size": -4}, "hidden_size is -4; it must be at least 1"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be at least 1"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be at least 1"),
    ({"head_dim": 0}, "head_dim is 0; it must be at least 1"),
    ({"router": "atention"}, "router is 'atention'; it must be one of attention, linear, shared-expert"),
    ({"rope_angles": "float16"}, "rope_angles is 'float16'; it must be one of float32, bfloat16"),
    ({"packing": "none"}, "packing is 'none'; it must be one of continuous, megatron, hf-mask, isolated"),
    ({"hidden_size": 15}, "hidden_size 15 is odd; LFA's first convolution has hidden_size / 2 rows"),
    ({"num_experts": (8, 8, 8)}, "num_experts lists 3 layers, the model has 2; give one number, or one a layer"),
    (
        {"num_experts": (8, 0), "intermediate_size": 0},
        "layer 1 has no experts, so intermediate_size must be at least 1",
    ),
    ({"moe_intermediate_size": 0}, "layer 0 has 8 experts, so moe_intermediate_size must be at least 1"),
    ({"num_experts_per_tok": 40}, "top-k 40 is outside 1..8 experts of layer 0 (num_experts_per_tok)"),
    ({"num_experts_per_tok": 0}, "top-k 0 is outside 1..8 experts of layer 0 (num_experts_per_tok)"),
    ({"num_experts": (8, 1)}, "top-k 2 is outside 1..1 experts of layer 1 (num_experts_per_tok)"),
    (
        {"router": "shared-expert"},
        "router 'shared-expert' with num_shared_experts 0: shared experts and router=\"shared-expert\" go together",
    ),
    ({"num_shared_experts": 1}, "router 'attention' with num_shared_experts 1: shared experts and router="),
    ({"partial_rotary_factor": 0.0}, "partial_rotary_factor 0.0 rotates 0 of 12 channels; it must give an even number"),
    ({"partial_rotary_factor": 1.5}, "partial_rotary_factor 1.5 rotates 18 of 12 channels"),
    ({"partial_rotary_factor": 0.25}, "partial_rotary_factor 0.25 rotates 3 of 12 channels"),
    ({"rope_theta": 1.0}, "rope_theta is 1.0; it must be above 1"),
    ({"rope_theta": float("nan")}, "rope_theta is nan; it must be above 1"),
    ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0; it must be above 0"),
    ({"initializer_range": -0.02}, "initializer_range is -0.02; it must be above 0"),
    ({"max_position_embeddings": 0}, "max_position_embeddings is 0; it must be at least 1"),
    ({"attention_dropout": 1.0}, "attention_dropout is 1.0; it must be in [0, 1)"),
    ({"eod_token_id": 32}, "eod_token_id 32 is outside the vocabulary of 32"),
    ({"sep_token_id": -1}, "sep_token_id -1 is outside the vocabulary of 32"),
    ({"pad_token_id": 99}, "pad_token_id 99 is outside the vocabulary of 32"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message.split(";")[0] for _, message in WRONG])
def test_numbers_that_describe_no_model_are_refused(changes, message):
    with pytest.raises(ConfigError) as refusal:
        small_config(**changes)
    assert message in str(refusal.value)


MISTYPED = [
    ({"hidden_size": 16.0}, "config key hidden_size is 16.0; it must be of type int"),
    ({"hidden_size": True}, "config key hidden_size is True; it must be of type int"),
    ({"localized_filtering": 1}, "config key localized_filtering is 1; it must be of type bool"),
    ({"rope_theta": "10000"}, "config key rope_theta is '10000'; it must be of type float"),
    ({"rope_theta": True}, "config key rope_theta is True; it must be of type float"),
    ({"router": 1}, "config key router is 1; it must be of type"),
    ({"num_experts": [8, "8"]}, "config key num_experts is [8, '8']; it must be of type int | tuple"),
    ({"num_experts": None}, "config key num_experts is None; it must be of type int | tuple"),
    ({"hiden_size": 16}, "unknown config key 'hiden_size'; did you mean hidden_size?"),
    ({"zzz": 1}, "unknown config key 'zzz'; known keys: vocab_size, hidden_size, "),
]


@pytest.mark.parametrize(("changes", "message"), MISTYPED, ids=[str(changes) for changes, _ in MISTYPED])
def test_values_of_another_type_and_unknown_keys_are_refused(changes, message):
    with pytest.raises(ConfigError) as refusal:
        ModelConfig.from_dict(small_config().to_dict() | changes)
    assert message in str(refusal.value)


def test_missing_keys_are_named():
    values = small_config().to_dict()
    del values["head_dim"]
    with pytest.raises(ConfigError, match="config key head_dim is missing"):
        ModelConfig.from_dict(values)


def test_unknown_changes_are_refused():
    with pytest.raises(ConfigError, match="unknown config key 'rope_base'"):
        small_config().replace(rope_base=1e6)


@given(configs())
def test_a_config_survives_json(config):
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_experts_by_layer(changes):
    config = small_config(**changes)
    assert len(config.experts_per_layer) == config.num_hidden_layers
    assert config.is_moe == any(config.experts_per_layer)
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert hash(config) == hash(ModelConfig.from_dict(config.to_dict()))


def test_a_config_does_not_change():
    with pytest.raises(AttributeError):
        small_config().hidden_size = 32


def test_m32_is_the_released_model():
    m32 = preset("M32")
    assert (m32.attention_size, m32.rotary_dim, m32.is_moe) == (4096, 128, True)
    assert m32.experts_per_layer == (32,) * 24
    assert (m32.eod_token_id, m32.sep_token_id, m32.pad_token_id) == (77185, 77187, 77185)
    assert (m32.rope_theta, m32.rope_angles, m32.packing) == (10000.0, "float32", "continuous")


def test_yuan3_flash_has_the_same_geometry():
    flash = preset("yuan3-flash")
    assert flash == preset("M32", vocab_size=136064, rope_theta=1e6)


def test_presets_go_by_every_name_and_take_changes():
    for alias, name in ALIASES.items():
        assert preset(alias) == preset(name.upper())
    assert preset("tiny", num_experts=[4, 8]).experts_per_layer == (4, 8)
    for name in PRESETS:
        assert preset(name).rotary_dim % 2 == 0
    with pytest.raises(ConfigError, match="unknown preset 'yuan4'; known presets: yuan2-m32, yuan2-2b"):
        preset("yuan4")
