"""Official checkpoints of every kind, written for tests straight from the spec and without the code under test.

A state is what our model's `state_dict()` is; `official_state` says what the released files hold for it.
"""

import argparse
import json
import re
import sys
import tempfile
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from yuanmoe.config import ModelConfig
from yuanmoe.model.decoder import CausalLM

State = dict[str, Tensor]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def memory_folder() -> tempfile.TemporaryDirectory:
    """A folder in memory where there is such a place: thousands of flushed files would take a minute on a disk."""
    return tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)


def random_state(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> State:
    """Random weights under the names and shapes of the model itself."""
    generator = torch.Generator().manual_seed(seed)
    own = CausalLM(config).state_dict()
    return {name: torch.randn(tensor.shape, generator=generator).to(dtype) for name, tensor in own.items()}


def official_state(config: ModelConfig, state: State) -> State:
    """The same weights as the released files hold them (spec 1.3, 1.4, 1.8 to 1.10)."""
    official: State = {}
    for name, tensor in state.items():
        if ".self_attn." in name:
            prefix, _, role = name.rpartition("self_attn.")
            official |= {f"{prefix}self_attn.{n}": t for n, t in _official_attention(config, state, name, role).items()}
        elif ".mlp." in name:
            prefix, _, role = name.rpartition("mlp.")
            official |= {f"{prefix}mlp.{n}": t for n, t in _official_feed_forward(config, role, tensor).items()}
        else:
            official[name] = tensor
    return {name: tensor.contiguous() for name, tensor in official.items()}


def _official_attention(config: ModelConfig, state: State, name: str, role: str) -> State:
    if role in ("q_proj.weight", "k_proj.weight"):
        heads = (config.num_attention_heads, config.head_dim, config.hidden_size)
        q, k = (state[name.replace(role, f"{which}_proj.weight")].view(heads) for which in "qk")
        mixed = torch.cat([matrix for pair in zip(q, k, strict=True) for matrix in pair])
        return dict(zip(("q_proj.weight", "k_proj.weight"), mixed.chunk(2), strict=True))
    if re.fullmatch(r"lfa\.conv[12]\.weight", role):
        previous, current = state[name].chunk(2, dim=1)
        return {role.replace("lfa.", "lf_gate."): torch.stack([previous, current], -1)[..., None]}
    return {role.replace("lfa.norm", "lf_gate.output_layernorm").replace("lfa.", "lf_gate."): state[name]}


def _official_feed_forward(config: ModelConfig, role: str, tensor: Tensor) -> State:
    if role == "router.weight" and config.router == "attention":
        return dict(zip((f"gate.{r}.weight" for r in ("query", "key", "value")), tensor.chunk(3), strict=True))
    if role in ("router.weight", "router.bias"):
        return {role.replace("router", "gate"): tensor}
    matrix_name = "w1" if "gate_up" in role else "w2"
    if role.startswith("experts."):
        return {f"experts.{expert}.{matrix_name}.weight": matrix for expert, matrix in enumerate(tensor)}
    if role.startswith("shared_experts."):
        return {f"shared_experts.{matrix_name}.weight": tensor}
    if role == "gate_up_proj.weight":
        return dict(zip(("up_proj.weight", "gate_proj.weight"), tensor.chunk(2), strict=True))
    return {role: tensor}


def official_json(config: ModelConfig, **changes) -> dict:
    """A config.json as released, of an MoE model under the Attention Router or a dense one."""
    values = {
        "architectures": ["CausalLM"],
        "auto_map": {"AutoModelForCausalLM": "a_file_that_is_not_there.YuanForCausalLM"},
        "model_type": "yuan",
        "tokenizer_class": "YuanTokenizer",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "attention_projection_size": config.attention_size,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "dropout": 0.0,
        "eod_token": config.eod_token_id,
        "sep_token": config.sep_token_id,
        "sep_token_id": config.eod_token_id,
        "pad_token_id": config.pad_token_id,
        "reset_attention_mask": True,
        "reset_position_ids": True,
        "torch_dtype": "bfloat16",
    }
    if config.is_moe:
        values["moe_config"] = {
            "moe_num_experts": config.num_experts,
            "moe_top_k": config.num_experts_per_tok,
            "norm_topk_prob": True,
            "gated_linear_unit": True,
            "ffn_hidden_size": config.moe_intermediate_size,
        }
    return values | changes


def write_json(path: Path, values: Mapping) -> None:
    path.write_text(json.dumps(values, indent=2))


def write_safetensors(folder: Path, config_json: Mapping, state: State, shards: int = 1) -> Path:
    """An official directory of one safetensors file, or of several with an index."""
    return _write(folder, config_json, state, shards, "model", "safetensors", lambda part, path: save_file(part, path))


def write_bin(folder: Path, config_json: Mapping, state: State, shards: int = 1) -> Path:
    """An official directory of pickles, as released."""
    return _write(
        folder,
        config_json,
        state,
        shards,
        "pytorch_model",
        "bin",
        lambda part, path: torch.save(OrderedDict(part), path),
    )


def _write(folder: Path, config_json: Mapping, state: State, shards: int, stem: str, suffix: str, save) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config_json)
    if shards == 1:
        save(state, folder / f"{stem}.{suffix}")
        return folder
    names = list(state)
    places = {
        name: f"{stem}-{at * shards // len(names) + 1:05}-of-{shards:05}.{suffix}" for at, name in enumerate(names)
    }
    for file in sorted(set(places.values())):
        save({name: state[name] for name in names if places[name] == file}, folder / file)
    write_json(folder / f"{stem}.{suffix}.index.json", {"metadata": {}, "weight_map": places})
    return folder


# --- GPTQ (spec 3.5) --------------------------------------------------------------------------------------------------


def pack_gptq(
    weight: Tensor, bits: int, group: int, g_idx: Tensor | None = None, *, symmetric: bool = False
) -> tuple[State, Tensor]:
    """A linear packed with random scales and codes of its shape, and the fp16 weight that it stands for.

    The zeros are random too, unless `symmetric`: then they are the middle code.
    """
    outputs, inputs = weight.shape
    g_idx = torch.arange(inputs) // group if g_idx is None else g_idx
    groups = int(g_idx.max()) + 1
    codes = torch.randint(0, 2**bits, (inputs, outputs))
    zeros = torch.randint(0, 2**bits, (groups, outputs))
    if symmetric:
        zeros.fill_(2 ** (bits - 1))
    scales = (torch.rand(groups, outputs) * 0.1 + 0.01).half()
    expected = torch.empty(outputs, inputs, dtype=torch.float16)
    for i in range(inputs):
        g = int(g_idx[i])
        expected[:, i] = (scales[g].double() * (codes[i] - zeros[g]).double()).half()
    return {
        "qweight": _pack_rows(codes, bits),
        "qzeros": _pack_rows(((zeros - 1) % 2**bits).T, bits).T.contiguous(),
        "scales": scales,
        "g_idx": g_idx.int(),
    }, expected


def _pack_rows(codes: Tensor, bits: int) -> Tensor:
    """int32 words of consecutive rows of `codes`, the first in the lowest bits."""
    per_word = 32 // bits
    words = torch.zeros(codes.shape[0] // per_word, codes.shape[1], dtype=torch.int64)
    for row in range(codes.shape[0]):
        words[row // per_word] |= codes[row] << bits * (row % per_word)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def write_gptq(
    folder: Path,
    config_json: Mapping,
    official: State,
    bits: int,
    cuts: Sequence[float],
    *,
    group: int = 8,
    symmetric: bool = False,
) -> State:
    """An official GPTQ directory, its one file cut into raw pieces at these shares of its bytes; the weights in it."""
    folder.mkdir(parents=True)
    stored: State = {}
    expected: State = {}
    for name, tensor in official.items():
        if "_proj" in name or ".gate." in name or ".experts." in name:
            parts, expected[name] = pack_gptq(tensor, bits, group, symmetric=symmetric)
            stored |= {f"{name.removesuffix('weight')}{suffix}": part for suffix, part in parts.items()}
        else:
            stored[name] = expected[name] = tensor.half()
    base = f"gptq_model-{bits}bit-{group}g"
    whole = folder / f"{base}.safetensors"
    save_file(stored, whole)
    content = whole.read_bytes()
    whole.unlink()
    edges = [0, *(int(cut * len(content)) for cut in cuts), len(content)]
    for piece, (start, stop) in enumerate(pairwise(edges)):
        (folder / f"{whole.name}{piece:02}").write_bytes(content[start:stop])
    settings = {"bits": bits, "group_size": group, "desc_act": False, "sym": True, "quant_method": "gptq"}
    write_json(folder / "quantize_config.json", settings)
    write_json(folder / "config.json", {**config_json, "quantization_config": settings})
    return expected


# --- Megatron (spec 3.4) ----------------------------------------------------------------------------------------------


@contextmanager
def _megatron_module() -> Iterator[type]:
    """A class of `megatron.core.enums`, which exists only while the file is written."""
    names = ("megatron", "megatron.core", "megatron.core.enums")
    modules = {name: types.ModuleType(name) for name in names}
    model_type = type("ModelType", (), {"__module__": names[-1]})
    modules[names[-1]].ModelType = model_type
    sys.modules.update(modules)
    try:
        yield model_type
    finally:
        for name in names:
            del sys.modules[name]


def write_megatron(folder: Path, config: ModelConfig, state: State, stages: int, **args) -> Path:
    """Pipeline shards of a tied model as Megatron writes them, settings and alien objects included."""
    per_stage = config.num_hidden_layers // stages
    official = official_state(config, state)
    settings = {
        "num_attention_heads": config.num_attention_heads,
        "rotary_percent": config.partial_rotary_factor,
        "max_position_embeddings": config.max_position_embeddings,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": stages,
        "params_dtype": torch.bfloat16,
    }
    for stage in range(stages):
        encoder: State = {}
        for layer in range(per_stage):
            encoder |= _megatron_layer(official, config, stage * per_stage + layer, f"layers.{layer}.")
        language_model: dict = {"encoder": encoder}
        model: dict = {"language_model": language_model}
        if stage == 0:
            language_model["embedding"] = {"word_embeddings": {"weight": state[EMBEDDING]}}
        if stage == stages - 1:
            encoder["final_layernorm.weight"] = state["model.norm.weight"]
            model["word_embeddings_for_head"] = {"weight": state[EMBEDDING].clone()}
        path = folder / "iter_0001477" / f"mp_rank_00_{stage:03}"
        path.mkdir(parents=True)
        with _megatron_module() as model_type:
            namespace = argparse.Namespace(**settings | args, model_type=model_type(), names={"a", "b"})
            content = {"args": namespace, "checkpoint_version": 3.0, "iteration": 1477, "model": model}
            torch.save(content, path / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("1477")
    return folder


def _megatron_layer(official: State, config: ModelConfig, layer: int, prefix: str) -> State:
    tensors = {n.removeprefix(f"model.layers.{layer}."): t for n, t in official.items() if f".layers.{layer}." in n}
    found = {n.replace("self_attn", "self_attention"): t for n, t in tensors.items() if "norm" in n or "lf_gate" in n}
    found["self_attention.get_query_key.weight"] = torch.cat([tensors[f"self_attn.{r}_proj.weight"] for r in "qk"])
    found["self_attention.get_value.weight"] = tensors["self_attn.v_proj.weight"]
    found["self_attention.dense.weight"] = tensors["self_attn.o_proj.weight"]
    if config.is_moe:
        gate = torch.cat([tensors[f"mlp.gate.{role}.weight"] for role in ("query", "key", "value")])
        w1, w2 = (
            torch.stack([tensors[f"mlp.experts.{e}.{name}.weight"].T for e in range(config.num_experts)])
            for name in ("w1", "w2")
        )
        found["mlp.router.attention_router.query_key_value.weight"] = gate
        found["mlp.experts.weight1"] = w1.reshape(config.hidden_size, -1)
        found["mlp.experts.weight2"] = w2.reshape(-1, config.hidden_size)
    else:
        found["mlp.dense_h_to_4h.weight"] = torch.cat([tensors["mlp.up_proj.weight"], tensors["mlp.gate_proj.weight"]])
        found["mlp.dense_4h_to_h.weight"] = tensors["mlp.down_proj.weight"]
    return {prefix + name: tensor for name, tensor in found.items()}
