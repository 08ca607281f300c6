"""Megatron checkpoints of any number of pipeline stages, under the official names.

`iter_0001477/mp_rank_00_003/model_optim_rng.pt` is stage 3 of the pipeline; layers count from 0 in every stage
(spec 3.4). `experts.weight1` is declared [D, E * 2F] but lies in memory as [E, D, 2F], `weight2` as [E, F, D]; both
are transposed here, expert by expert. There is no config.json: sizes come from the tensors, the rest from `args`.
Legend: D hidden, E experts, F expert width.
Not here: tensor-parallel splits, optimizer and random states.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from yuanmoe.checkpoint.files.lazy import ComposedTensor, LazyTensor, TensorPart, Weights
from yuanmoe.checkpoint.files.pickle_file import MEGATRON_NAMES, Inert, read_pickle
from yuanmoe.checkpoint.formats.mapping import EMBEDDING, HEAD
from yuanmoe.config import SPECIAL_TOKENS, ModelConfig
from yuanmoe.errors import CheckpointError

LATEST = "latest_checkpointed_iteration.txt"
WEIGHTS = "model_optim_rng.pt"

_GLOBAL = {
    "language_model.embedding.word_embeddings.weight": EMBEDDING,
    "language_model.encoder.final_layernorm.weight": "model.norm.weight",
    "language_model.output_layer.weight": HEAD,
    "word_embeddings_for_head.weight": HEAD,
}

_RANK = re.compile(r"mp_rank_(\d+)(?:_(\d+))?")
_LAYER = re.compile(r"language_model\.encoder\.layers\.(\d+)\.(.+)")

_SAME = (
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    *(f"self_attn.lf_gate.{conv}.{kind}" for conv in ("conv1", "conv2") for kind in ("weight", "bias")),
    "self_attn.lf_gate.output_layernorm.weight",
)

# One tensor of a layer, and the official ones that are its equal parts, in order.
_PARTS: dict[str, tuple[str, ...]] = {name.replace("self_attn.", "self_attention."): (name,) for name in _SAME} | {
    "self_attention.get_query_key.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight"),
    "self_attention.get_value.weight": ("self_attn.v_proj.weight",),
    "self_attention.dense.weight": ("self_attn.o_proj.weight",),
    "mlp.router.attention_router.query_key_value.weight": tuple(
        f"mlp.gate.{role}.weight" for role in ("query", "key", "value")
    ),
    "mlp.dense_h_to_4h.weight": ("mlp.up_proj.weight", "mlp.gate_proj.weight"),
    "mlp.dense_4h_to_h.weight": ("mlp.down_proj.weight",),
}

_EXPERTS = {"mlp.experts.weight1": "w1", "mlp.experts.weight2": "w2"}


class MegatronCheckpoint(NamedTuple):
    """The weights under official names, and the numbers among Megatron's settings."""

    weights: Weights
    args: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class TransposedTensor(LazyTensor):
    """The matrix whose transpose is stored in `source` from element `offset` on."""

    source: LazyTensor
    offset: int

    def flat(self, start: int, stop: int) -> Tensor:
        rows, columns = self.shape
        stored = self.source.flat(self.offset, self.offset + self.numel).view(columns, rows)
        first, last = start // columns, -(-stop // columns)
        return stored[:, first:last].T.reshape(-1)[start - first * columns : stop - first * columns]


def is_megatron(path: Path) -> bool:
    """Whether this folder holds iterations of a Megatron run, or is one of them."""
    return (path / LATEST).is_file() or any(path.glob("mp_rank_*")) or any(path.glob("iter_*/mp_rank_*"))


def open_megatron(path: Path) -> MegatronCheckpoint:
    """The latest iteration in `path`. Raises CheckpointError for missing stages and for tensor parallelism."""
    tensors: dict[str, LazyTensor] = {}
    args: dict[str, Any] = {}
    files = []
    layers = 0
    for file in _stages(_iteration(path)):
        data, content = read_pickle(file, inert=MEGATRON_NAMES)
        if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
            raise CheckpointError(f"{file} has no dictionary 'model'; it is not a Megatron checkpoint")
        settings = content.get("args")
        if not args and isinstance(settings, Inert) and isinstance(settings.state, dict):
            args = {name: value for name, value in settings.state.items() if isinstance(value, int | float)}
        stored = dict(_flattened("", content["model"]))
        for name, tensor in stored.items():
            tensors.update(_official(file, name, tensor, layers, stored))
        layers += len({match[1] for name in stored if (match := _LAYER.fullmatch(name))})
        files.append(data)
    for setting, found in (("tensor_model_parallel_size", 1), ("pipeline_model_parallel_size", len(files))):
        if args.get(setting, found) != found:
            raise CheckpointError(f"{path}: {setting} is {args[setting]}, but there are weights for {found}")
    return MegatronCheckpoint(Weights(tensors, tuple(files)), args)


def _iteration(path: Path) -> Path:
    if any(path.glob("mp_rank_*")):
        return path
    if not (path / LATEST).is_file():
        return max(path.glob("iter_*"))
    latest = (path / LATEST).read_text().strip()
    folder = path / (f"iter_{int(latest):07d}" if latest.isdecimal() else "release")
    if not folder.is_dir():
        raise CheckpointError(f"{path / LATEST} names iteration {latest[:80]!r}, but {folder} is missing")
    return folder


def _stages(folder: Path) -> list[Path]:
    """The weight files of all pipeline stages in order."""
    ranks: dict[int, Path] = {}
    for rank in folder.glob("mp_rank_*"):
        match = _RANK.fullmatch(rank.name)
        if not match or int(match[1]) > 0:
            raise CheckpointError(
                f"{rank} is a tensor-parallel or expert-parallel part; merge the parts with Megatron's own tools first"
            )
        ranks[int(match[2] or 0)] = rank
    files = [ranks[stage] / WEIGHTS for stage in sorted(ranks)]
    stages = range(max(ranks, default=0) + 1)
    missing = [f"pipeline stage {stage}" for stage in stages if stage not in ranks]
    missing += [str(file) for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{folder}: {missing[0]} is missing ({len(missing)} in all); download it again")
    return files


def _flattened(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, LazyTensor]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flattened(f"{prefix}{name}.", value)
        elif isinstance(value, LazyTensor):
            yield prefix + name, value


def _official(
    file: Path, name: str, tensor: LazyTensor, first_layer: int, stage: Mapping[str, LazyTensor]
) -> Iterator[tuple[str, LazyTensor]]:
    """The official tensors that are in this one of a stage whose layer 0 is the model's `first_layer`."""
    match = _LAYER.fullmatch(name)
    if name in _GLOBAL:
        yield _GLOBAL[name], tensor
    elif match and match[2] in _PARTS:
        prefix = f"model.layers.{first_layer + int(match[1])}."
        parts = _PARTS[match[2]]
        for index, part in enumerate(parts):
            yield prefix + part, _equal_part(file, name, tensor, index, len(parts))
    elif match and match[2] in _EXPERTS:
        prefix = f"model.layers.{first_layer + int(match[1])}.mlp.experts"
        for expert, matrix in enumerate(_experts(file, name, tensor, stage)):
            yield f"{prefix}.{expert}.{_EXPERTS[match[2]]}.weight", matrix
    elif not name.endswith("inv_freq"):
        raise CheckpointError(f"{file}: unknown tensor {name!r} {tensor.shape}; it is not of a Yuan 2.0 model")


def _equal_part(file: Path, name: str, tensor: LazyTensor, index: int, count: int) -> LazyTensor:
    if count == 1:
        return tensor
    if not tensor.shape or tensor.shape[0] % count:
        raise CheckpointError(f"{file}: tensor {name!r} has shape {tensor.shape}, which is not {count} equal parts")
    size = tensor.numel // count
    shape = (tensor.shape[0] // count, *tensor.shape[1:])
    return ComposedTensor.of(shape, [TensorPart(tensor, index * size, (index + 1) * size)])


def _experts(file: Path, name: str, tensor: LazyTensor, stage: Mapping[str, LazyTensor]) -> Iterator[LazyTensor]:
    """One matrix an expert; how many there are, the router of the same layer knows."""
    router = stage.get(name.rpartition(".experts.")[0] + ".router.attention_router.query_key_value.weight")
    rows, hidden = router.shape if router is not None and len(router.shape) == 2 else (0, 0)
    experts = rows // 3
    if not experts * hidden or tensor.numel % (experts * hidden):
        raise CheckpointError(
            f"{file}: {name!r} of shape {tensor.shape} does not fit {experts} experts and hidden size {hidden}, "
            "which is what the router of its layer has"
        )
    width = tensor.numel // (experts * hidden)
    shape = (width, hidden) if name.endswith("weight1") else (hidden, width)
    for expert in range(experts):
        yield TransposedTensor(shape=shape, dtype=tensor.dtype, source=tensor, offset=expert * width * hidden)


def megatron_fields(checkpoint: MegatronCheckpoint) -> dict[str, Any]:
    """The fields of ModelConfig that the tensors and Megatron's settings give."""
    args, shapes = checkpoint.args, {name: tensor.shape for name, tensor in checkpoint.weights.tensors.items()}
    layers = sum(name.endswith(".input_layernorm.weight") for name in shapes)
    heads = args.get("num_attention_heads", 0)
    value = "model.layers.0.self_attn.v_proj.weight"
    if heads < 1 or len(shapes.get(EMBEDDING, ())) != 2 or not shapes.get(value):
        raise CheckpointError(
            f"the Megatron checkpoint has num_attention_heads {heads} in its args and {len(shapes)} tensors; "
            "that does not describe a model: put the official config.json beside it, or download it again"
        )
    rows = shapes[EMBEDDING][0]
    released: dict[str, Any] = {f.name: f.default for f in fields(ModelConfig) if f.name in SPECIAL_TOKENS}
    if rows <= max(released.values()):
        raise CheckpointError(
            f"the Megatron checkpoint has a vocabulary of {rows:,}, without the special tokens of the released one "
            f"({', '.join(f'{name} {value}' for name, value in released.items())}), and does not say its own: put a "
            "config.json beside it with them and the sizes of the model, as the official ones have"
        )
    sizes: dict[str, Any] = {
        "vocab_size": rows,
        "hidden_size": shapes[EMBEDDING][1],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "head_dim": shapes[value][0] // heads,
        "partial_rotary_factor": args.get("rotary_percent", 1.0),
        "rope_theta": args.get("rotary_base", 10000.0),
        "max_position_embeddings": args.get("max_position_embeddings", 4096),
    }
    if "model.layers.0.mlp.down_proj.weight" in shapes:
        return sizes | {"intermediate_size": shapes["model.layers.0.mlp.down_proj.weight"][1]}
    return sizes | {
        "num_experts": shapes.get("model.layers.0.mlp.gate.query.weight", (0,))[0],
        "num_experts_per_tok": args.get("moe_router_topk", 2),
        "moe_intermediate_size": shapes.get("model.layers.0.mlp.experts.0.w2.weight", (0, 0))[1],
    }
