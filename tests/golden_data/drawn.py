"""Golden checkpoints whose weights are drawn again from a seed, so that only what is computed from them is kept.

D hidden channels, A attention channels, E experts, F their channels, V vocabulary.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

DATA = Path(__file__).parent
SEEDS = {"moe-tiny": 0, "moe-32x2": 1, "dense-tiny": 2}
BITS = {"moe-32x2": "83d63228a0425d21549320de905925d7400a4ba5ec7e747df60d2d1225390b78"}
"""The sums of weights of which a last bit decides a greedy token."""
EMBEDDING_STD, BIAS_STD, NORM_STD, ROUTER_GAIN = 0.7, 0.3, 0.2, 1.1

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def write_golden(folder: Path) -> Path:
    """All golden checkpoints of this folder, complete, in another one."""
    for name in SEEDS:
        shutil.copytree(DATA / name, folder / name)
        file = folder / name / "model.safetensors"
        if not file.exists():
            save_file(drawn_weights(name), file, {"format": "pt"})
    return folder


def drawn_weights(name: str) -> dict[str, Tensor]:
    """The float32 weights of a golden checkpoint by their official names."""
    config = json.loads((DATA / name / "config.json").read_text())
    generator = torch.Generator().manual_seed(SEEDS[name])
    return {name: _drawn(name, shape, generator) for name, shape in _shapes(config)}


def sums(weights: dict[str, Tensor]) -> str:
    """The SHA-256 of the bits of all weights, in order of their names."""
    digest = hashlib.sha256()
    for _, tensor in sorted(weights.items()):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _drawn(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    numbers = torch.randn(shape, generator=generator)
    if "norm" in name:
        return 1 + numbers * NORM_STD
    if name.endswith(".bias"):
        return numbers * BIAS_STD
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        return numbers * EMBEDDING_STD
    gain = ROUTER_GAIN if ".mlp.gate." in name else 1.0
    return numbers * gain / math.sqrt(math.prod(shape[1:]))


def _shapes(config: dict) -> Shapes:
    """Names and shapes in the order in which they are drawn."""
    D, V = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (V, D)
    for layer in range(config["num_hidden_layers"]):
        for name, shape in (*_attention(D, config.get("attention_projection_size", D)), *_mlp(config)):
            yield f"model.layers.{layer}.{name}", shape
        yield f"model.layers.{layer}.input_layernorm.weight", (D,)
        yield f"model.layers.{layer}.post_attention_layernorm.weight", (D,)
    yield "model.norm.weight", (D,)
    yield "lm_head.weight", (V, D)


def _attention(D: int, A: int) -> Shapes:
    yield "self_attn.v_proj.weight", (A, D)
    yield "self_attn.o_proj.weight", (D, A)
    yield "self_attn.lf_gate.conv1.weight", (D // 2, D, 2, 1)
    yield "self_attn.lf_gate.conv1.bias", (D // 2,)
    yield "self_attn.lf_gate.conv2.weight", (D, D // 2, 2, 1)
    yield "self_attn.lf_gate.conv2.bias", (D,)
    yield "self_attn.lf_gate.output_layernorm.weight", (D,)
    yield "self_attn.q_proj.weight", (A, D)
    yield "self_attn.k_proj.weight", (A, D)


def _mlp(config: dict) -> Shapes:
    D, moe = config["hidden_size"], config.get("moe_config")
    if moe is None:
        F = config["intermediate_size"]
        yield "mlp.up_proj.weight", (F, D)
        yield "mlp.gate_proj.weight", (F, D)
        yield "mlp.down_proj.weight", (D, F)
        return
    E, F = moe["moe_num_experts"], moe["ffn_hidden_size"]
    for part in ("query", "key", "value"):
        yield f"mlp.gate.{part}.weight", (E, D)
    for expert in range(E):
        yield f"mlp.experts.{expert}.w1.weight", (2 * F, D)
        yield f"mlp.experts.{expert}.w2.weight", (D, F)
