"""Small quantized models for tests, made of sources in every precision that checkpoints come in."""

import functools
from pathlib import Path

import torch

from checkpoint_writers import memory_folder, official_json, official_state, write_gptq
from small_models import VARIANTS, random_model, small_config
from yuanmoe.checkpoint.load import load_model
from yuanmoe.checkpoint.quantize.quantize import quantize_checkpoint
from yuanmoe.checkpoint.write.save import save_native
from yuanmoe.config import ModelConfig
from yuanmoe.model.quantized.build import QuantizedYuan

OFFICIAL = ("m32", "dense")
"""The variants that a released configuration can say, as a GPTQ source has to."""

SOURCES = ("float32", "float16", "bfloat16", "gptq")
"""What the weights were in before they were quantized; routers, norms and roles left as they are keep it."""


@functools.cache
def quantized(
    variant: str,
    bits: int,
    source: str = "bfloat16",
    *,
    spread: float = 0.3,
    roles: tuple[tuple[str, int], ...] = (),
    width: int = 32,
) -> QuantizedYuan:
    """A model in few bits; the mapped files may vanish, their pages stay."""
    sizes = {"hidden_size": width, "num_attention_heads": width // 16, "head_dim": 16, "moe_intermediate_size": 16}
    # One of the sizes a multiple of 8, as GPTQ files have groups of 8 here.
    config = small_config(**{**sizes, "intermediate_size": 24, "initializer_range": spread, **VARIANTS[variant]})
    with memory_folder() as folder:
        _write(f"{folder}/source", config, source)
        quantize_checkpoint(f"{folder}/source", f"{folder}/few", bits=bits, roles=dict(roles))
        model = load_model(f"{folder}/few")
    assert isinstance(model, QuantizedYuan)
    return model


def _write(path: str, config: ModelConfig, source: str) -> None:
    state = random_model(config).state_dict()
    if source == "gptq":
        official = official_state(config, state)
        write_gptq(Path(path), official_json(config), official, 8, (), symmetric=True)
        return
    dtype = getattr(torch, source)
    save_native({name: tensor.to(dtype) for name, tensor in state.items()}, config, path)
