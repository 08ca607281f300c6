"""The released models and our small ones by name, as configurations.

Sources: arXiv 2311.15786 (Yuan 2.0), arXiv 2405.17976 (Yuan 2.0-M32), the released config.json files.
Not here: what the fields mean (`config.py`), weights (`shipped.py`, `checkpoint/`).
"""

from typing import Any

from yuanmoe.config import ModelConfig
from yuanmoe.errors import ConfigError

_DENSE = {"vocab_size": 135040, "partial_rotary_factor": 1.0}

_M32 = {
    "vocab_size": 135040,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "head_dim": 256,
    "num_experts": 32,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8192,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 4096,
}

# Small models of our own use a byte-level BPE tokenizer, whose special tokens come first.
_OWN_TOKENS = {"eod_token_id": 0, "sep_token_id": 1, "pad_token_id": 2}

PRESETS: dict[str, dict[str, Any]] = {
    "yuan2-m32": _M32,
    "yuan2-2b": _DENSE
    | {
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "head_dim": 64,
        "intermediate_size": 8192,
        "max_position_embeddings": 8192,
    },
    "yuan2-51b": _DENSE
    | {
        "hidden_size": 8192,
        "num_hidden_layers": 42,
        "num_attention_heads": 64,
        "head_dim": 128,
        "intermediate_size": 32768,
        "max_position_embeddings": 4096,
    },
    "yuan2-102b": _DENSE
    | {
        "hidden_size": 8192,
        "num_hidden_layers": 84,
        "num_attention_heads": 64,
        "head_dim": 128,
        "intermediate_size": 32768,
        "max_position_embeddings": 4096,
    },
    # The text backbone of Yuan 3.0 Flash: M32's geometry, another vocabulary and RoPE base.
    "yuan3-flash": _M32 | {"vocab_size": 136064, "rope_theta": 1e6},
    "tiny": _OWN_TOKENS
    | {
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 32,
        "num_experts": 8,
        "moe_intermediate_size": 64,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 256,
    },
    "nano": _OWN_TOKENS
    | {
        "vocab_size": 2048,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 32,
        "num_experts": 32,
        "moe_intermediate_size": 128,
        "tie_word_embeddings": False,
        "max_position_embeddings": 512,
    },
    "small": _OWN_TOKENS
    | {
        "vocab_size": 4096,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "head_dim": 64,
        "num_experts": 32,
        "moe_intermediate_size": 256,
        "tie_word_embeddings": False,
        "max_position_embeddings": 1024,
    },
}

ALIASES = {"m32": "yuan2-m32", "2b": "yuan2-2b", "51b": "yuan2-51b", "102b": "yuan2-102b"}


def find_preset(name: str) -> str | None:
    """The key of PRESETS that a name stands for, in any case: `M32` is `yuan2-m32`; None where there is none."""
    key = ALIASES.get(name.lower(), name.lower())
    return key if key in PRESETS else None


def preset(name: str, **changes: Any) -> ModelConfig:
    """A named configuration, with some fields changed; names are case-insensitive, `M32` is `yuan2-m32`.

    Raises ConfigError for an unknown name or field.
    """
    key = find_preset(name)
    if key is None:
        raise ConfigError(f"unknown preset {name!r}; known presets: {', '.join(PRESETS)}")
    return ModelConfig.from_dict(PRESETS[key] | changes)
