"""The released config.json files mean the published models (spec 3.2 and 3.3), and every key that matters is read."""

import pytest
import torch

from yuanmoe.checkpoint.formats.official_config import official_config, official_fields
from yuanmoe.config import ModelConfig
from yuanmoe.presets import preset

M32 = {
    "architectures": ["YuanForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_yuan.YuanConfig",
        "AutoModelForCausalLM": "yuan_hf_model.YuanForCausalLM",
    },
    "tokenizer_class": "YuanTokenizer",
    "attention_projection_size": 4096,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "eod_token", "eod_token_id"), 77185),
    "mask_token_id": 77185,
    "sep_token": 77187,
    "sep_token_id": 77185,
    "causal_mask": True,
    "dropout": 0,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "model_max_length": 8192,
    "model_type": "yuan",
    "moe_config": {
        "ffn_hidden_size": 8192,
        "gated_linear_unit": True,
        "moe_num_experts": 32,
        "moe_top_k": 2,
        "norm_topk_prob": True,
    },
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "output_router_logits": True,
    "reset_attention_mask": False,
    "reset_position_ids": True,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.30.2",
    "use_cache": True,
    "use_flash_attention": True,
    "use_loss_mask": False,
    "use_moe": True,
    "vocab_size": 135040,
}


def read(**values) -> ModelConfig:
    return ModelConfig.from_dict(official_fields(values))


def test_m32_and_2b_are_their_presets():
    assert read(**M32) == preset("m32")
    small = {"num_attention_heads": 32, "intermediate_size": 8192, "max_position_embeddings": 8192, "dropout": 0.1}
    switches = {"reset_attention_mask": True, "reset_position_ids": True, "use_flash_attention": False}
    assert read(**small, **switches) == preset("2b", attention_dropout=0.1)
    assert read() == read(**small)


def test_an_unchanged_model_keeps_its_config_and_a_changed_one_every_other_key():
    assert official_config(preset("m32"), torch.bfloat16, M32) == M32
    changed = official_config(preset("m32", rope_theta=40890.0, packing="isolated"), torch.float16, M32)
    assert changed["rope_theta"] == 40890.0
    assert changed["yuanmoe"] == {"packing": "isolated"}
    assert changed["torch_dtype"] == "float16"
    same = [key for key in M32 if changed[key] == M32[key]]
    assert set(M32) - set(same) == {"sep_token_id", "torch_dtype"}
    untied = official_config(preset("m32", tie_word_embeddings=False), torch.bfloat16, M32)
    assert untied == M32 | {"tie_word_embeddings": False}


@pytest.mark.parametrize(
    ("values", "field", "expected"),
    [
        ({"rope_theta": 1e6, "rotary_base": 5}, "rope_theta", 1e6),
        ({"rotary_base": 40890}, "rope_theta", 40890),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, "rope_theta", 7.0),
        ({"eod_token_id": 3, "eod_token": 4, "eos_token_id": 5}, "eod_token_id", 3),
        ({"eod_token": 4, "eos_token_id": 5}, "eod_token_id", 4),
        ({"eod_token": "<eod>", "eos_token_id": 5}, "eod_token_id", 5),
        ({"eod_token": 4}, "pad_token_id", 4),
        ({"sep_token": 9, "sep_token_id": 4}, "sep_token_id", 9),
        ({"sep_token": "<sep>", "sep_token_id": 4}, "sep_token_id", 4),
        ({"reset_attention_mask": True, "reset_position_ids": True}, "packing", "continuous"),
        ({"attention_projection_size": 4096}, "head_dim", 128),
        ({"attention_projection_size": 4096}, "partial_rotary_factor", 0.5),
        ({"head_dim": 128}, "attention_size", 4096),
        ({"use_moe": False, "moe_config": M32["moe_config"]}, "num_experts", 0),
        ({"moe_config": {"moe_num_experts": 8}}, "moe_intermediate_size", 8192),
        ({"dropout": 0.3, "attention_dropout": 0.2}, "attention_dropout", 0.2),
        ({"yuanmoe": {"rope_angles": "bfloat16"}}, "rope_angles", "bfloat16"),
        ({"hidden_size": None}, "hidden_size", 2048),
    ],
)
def test_keys_mean_what_the_released_code_takes_them_for(values, field, expected):
    assert getattr(read(**values), field) == expected
