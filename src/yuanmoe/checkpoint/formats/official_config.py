"""The official config.json in our terms, and back.

Sources: spec 3.2 and 3.3 (the released files), 1.5 (RoPE), 1.7 (packing). Absent keys have the defaults of the released
configuration class, which are the sizes of 2B. What the official keys cannot say (another router, experts by layer, no
LFA, a rotary share of its own) stands under one key of ours, `yuanmoe`, as fields of ModelConfig.
Not here: tensors (`mapping.py`); whether the head is the embedding, which the tensors decide (`open.py`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from yuanmoe.checkpoint.formats.native_config import dtype_name
from yuanmoe.config import ModelConfig
from yuanmoe.errors import ConfigError
from yuanmoe.hints import closest

EXTENSION = "yuanmoe"

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 135040,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "dropout": 0.1,
}
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")

# Keys whose other values would be another model than this package computes.
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("yuan",),
    "hidden_act": ("silu", "swish"),
    "causal_mask": (True,),
    "use_yarn": (False,),
    "rope_scaling": (None,),
}
_FIXED_MOE: dict[str, tuple[Any, ...]] = {"norm_topk_prob": (True,), "gated_linear_unit": (True,)}

_READ = (
    *(*_DEFAULTS, *_FIXED, EXTENSION, "attention_projection_size", "head_dim", "num_key_value_heads", "moe_config"),
    *("use_moe", "rope_theta", "rotary_base", "rope_parameters", "attention_dropout"),
    *("eod_token", "eod_token_id", "eos_token_id", "sep_token", "sep_token_id", "pad_token_id"),
)
_READ_MOE = (*_FIXED_MOE, "moe_num_experts", "moe_top_k", "ffn_hidden_size")

# Keys that change nothing of the arithmetic: switches of the released runtimes, and what Hugging Face itself writes.
_IGNORED = (
    "reset_attention_mask", "reset_position_ids", "use_flash_attention", "use_loss_mask", "output_router_logits",
    "model_max_length", "yarn_scale_factor", "attn_factor", "scaled_max_position_embeddings", "pretraining_tp",
    "quantization_config", "auto_map", "mask_token", "mask_token_id", "pad_token", "bos_token", "bos_token_id",
    "eos_token", "tokenizer_class", "architectures", "transformers_version", "torch_dtype", "dtype", "use_cache",
    "_name_or_path", "_commit_hash", "_attn_implementation", "_attn_implementation_autoset", "attn_implementation",
    "_experts_implementation", "return_dict", "output_hidden_states", "output_attentions", "torchscript",
    "use_bfloat16", "tf_legacy_loss", "pruned_heads", "chunk_size_feed_forward", "is_encoder_decoder", "is_decoder",
    "cross_attention_hidden_size", "add_cross_attention", "tie_encoder_decoder", "finetuning_task", "id2label",
    "label2id", "num_labels", "task_specific_params", "problem_type", "prefix", "decoder_start_token_id",
    "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "max_length",
    "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature",
    "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
    "return_dict_in_generate", "remove_invalid_values", "exponential_decay_length_penalty", "router_aux_loss_coef",
)  # fmt: skip


def official_fields(config: Mapping[str, Any], *, ignore_unknown: bool = False) -> dict[str, Any]:
    """The fields of ModelConfig that an official config.json describes, defaults included; null counts as absent.

    Raises ConfigError for unknown keys unless `ignore_unknown`, and for values that ask for another arithmetic.
    """
    present = {key: value for key, value in config.items() if value is not None}
    for key in ("moe_config", "rope_parameters", EXTENSION):
        if not isinstance(present.get(key, {}), dict):
            raise ConfigError(f"config key {key} is {present[key]!r}; it must be an object")
    moe = present.get("moe_config", {})
    if not ignore_unknown:
        _check_known(present, (*_READ, *_IGNORED))
        _check_known(moe, _READ_MOE)
    _check_fixed(present, _FIXED)
    _check_fixed(moe, _FIXED_MOE)
    values = _DEFAULTS | present
    sizes = _sizes(values)
    rotary = _rotary(values, sizes["head_dim"])
    return sizes | _feed_forward(values, moe) | rotary | _tokens(values) | present.get(EXTENSION, {})


def _check_known(values: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in values:
        if key not in known:
            close = closest(key, known)
            hint = f"did you mean {close}? " if close else ""
            raise ConfigError(
                f"unknown config key {key!r}; {hint}If it does not change what the model computes, take it out of the "
                "file, or go on without it: ignore_unknown=True, or yuanmoe convert --ignore-unknown"
            )


def _check_fixed(values: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]]) -> None:
    for key, supported in fixed.items():
        if key in values and values[key] not in supported:
            raise ConfigError(f"config key {key} is {values[key]!r}; supported: {', '.join(map(repr, supported))}")


def _sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    for name in _SIZES:
        if type(values[name]) is not int or values[name] < 1:
            raise ConfigError(f"config key {name} is {values[name]!r}; it must be an integer of at least 1")
    heads = values["num_attention_heads"]
    width = values.get("attention_projection_size", values["hidden_size"])
    head_dim = values.get("head_dim", width // heads if type(width) is int else width)
    if "attention_projection_size" not in values and "head_dim" in values:
        width = head_dim * heads
    if type(head_dim) is not int or head_dim < 1 or head_dim * heads != width:
        raise ConfigError(f"attention_projection_size {width} is not {heads} heads of {head_dim} channels")
    if values.get("num_key_value_heads", heads) != heads:
        raise ConfigError(
            f"num_key_value_heads is {values['num_key_value_heads']}, num_attention_heads {heads}; "
            "in Yuan models every head has its own keys and values"
        )
    return {name: values[name] for name in (*_SIZES, "rms_norm_eps", "initializer_range", "tie_word_embeddings")} | {
        "head_dim": head_dim,
        "attention_dropout": values.get("attention_dropout", values["dropout"]),
    }


def _feed_forward(values: Mapping[str, Any], moe: Mapping[str, Any]) -> dict[str, Any]:
    if not moe and values.get("use_moe"):
        raise ConfigError("config key use_moe is true, but moe_config with the number of experts is missing")
    if not moe or not values.get("use_moe", True):
        return {"intermediate_size": values["intermediate_size"]}
    return {
        "num_experts": moe.get("moe_num_experts", 0),
        "num_experts_per_tok": moe.get("moe_top_k", 2),
        "moe_intermediate_size": moe.get("ffn_hidden_size", values["intermediate_size"]),
    }


def _rotary(values: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    parameters = values.get("rope_parameters", {})
    if parameters.get("rope_type", "default") != "default":
        raise ConfigError(f"rope_parameters has rope_type {parameters['rope_type']!r}; supported: 'default'")
    theta = values.get("rope_theta", values.get("rotary_base", parameters.get("rope_theta", 10000.0)))
    # The released code rotates hidden / heads channels of a head, however many the head has.
    rotary_dim = values["hidden_size"] // values["num_attention_heads"]
    return {"rope_theta": theta, "partial_rotary_factor": rotary_dim / head_dim}


def _tokens(values: Mapping[str, Any]) -> dict[str, Any]:
    def first(*keys: str, default: int) -> int:
        return next((values[key] for key in keys if type(values.get(key)) is int), default)

    eod = first("eod_token_id", "eod_token", "eos_token_id", default=77185)
    # sep_token comes first: the released M32 has the right id there, and the one of <eod> in sep_token_id.
    sep = first("sep_token", "sep_token_id", default=77187)
    return {"eod_token_id": eod, "sep_token_id": sep, "pad_token_id": first("pad_token_id", default=eod)}


def official_config(
    config: ModelConfig, dtype: torch.dtype, original: Mapping[str, Any] | None = None, *, head_stored: bool = False
) -> dict[str, Any]:
    """A config.json for the official layout; `official_fields` reads the same configuration back from it.

    `original`, the one the model came with, keeps every key, and every value that still says the truth.
    `head_stored`: whether `lm_head.weight` is written although it equals the embedding.
    """
    wanted = config.to_dict()
    if original and _said(original) | {"tie_word_embeddings": config.tie_word_embeddings} == wanted:
        values = dict(original)
    else:
        values = _fresh(config) | {key: value for key, value in (original or {}).items() if key not in _READ}
        said = _said(values)
        extension = {name: value for name, value in wanted.items() if said[name] != value}
        values |= {EXTENSION: extension} if extension else {}
    if config.tie_word_embeddings != values.get("tie_word_embeddings", True) and not head_stored:
        values["tie_word_embeddings"] = config.tie_word_embeddings
    # transformers writes `dtype` since its version 5; only what is there is kept up to date.
    for key in {"torch_dtype", "dtype"} & values.keys() or {"torch_dtype"}:
        values[key] = dtype_name(dtype)
    return values


def _said(values: Mapping[str, Any]) -> dict[str, Any]:
    """All fields of ModelConfig as an official config.json gives them, as JSON values."""
    defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    return defaults | official_fields(values, ignore_unknown=True)


def _fresh(config: ModelConfig) -> dict[str, Any]:
    """The keys that official readers need, for a model that has no official config.json."""
    values = {
        "architectures": ["YuanForCausalLM"],
        "model_type": "yuan",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size or config.moe_intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "attention_projection_size": config.attention_size,
        "hidden_act": "silu",
        "causal_mask": True,
        "dropout": config.attention_dropout,
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "max_position_embeddings": config.max_position_embeddings,
        "model_max_length": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        # True would make the released code ignore the caller's attention mask.
        "reset_attention_mask": False,
        "reset_position_ids": False,
        "use_cache": True,
        "use_flash_attention": False,
        "use_loss_mask": False,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "eod_token", "eod_token_id"), config.eod_token_id),
        **dict.fromkeys(("sep_token", "sep_token_id"), config.sep_token_id),
        "pad_token_id": config.pad_token_id,
    }
    if config.rope_theta != 10000.0:
        values["rope_theta"] = config.rope_theta
    if config.is_moe:
        values |= {"use_moe": True, "output_router_logits": False, "moe_config": _moe_config(config)}
    return values


def _moe_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "moe_num_experts": max(config.experts_per_layer),
        "moe_top_k": config.num_experts_per_tok,
        "norm_topk_prob": True,
        "gated_linear_unit": True,
        "ffn_hidden_size": config.moe_intermediate_size,
    }
