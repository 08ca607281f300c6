"""The weights of decoder layers as the compiled kernels see them, and all that must stay as it is for that.

Taken once and checked before every use: 40 us for the 24 layers of M32, against 30 ms for going through the modules.
Legend: E experts, K chosen.
"""

from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from yuanmoe.model.attention import Attention
from yuanmoe.model.experts import DenseFeedForward, Experts, MixtureOfExperts
from yuanmoe.model.linear import Linear
from yuanmoe.model.norm import RMSNorm
from yuanmoe.model.quantized.layers import PackedMatrices, QuantizedExperts, QuantizedLinear
from yuanmoe.model.router import AttentionRouter, LinearRouter
from yuanmoe.ops import native
from yuanmoe.ops.native import structures as c

GONE: Final = object()


class UnsuitableError(Exception):
    """A layer that the kernels do not know as a whole. Never leaves `model`: the modules compute it then."""


class Watched(NamedTuple):
    """A name in one of a module's dictionaries, and what it stood for."""

    names: dict[str, Any]
    name: str
    value: object


@dataclass(slots=True, kw_only=True)
class Addresses:
    """`weights` is an array of one structure a layer; its tensors are kept alive by `watched`."""

    dtype: torch.dtype
    """Of the tokens."""
    weights: Any = None
    experts: list[int] = field(default_factory=list)
    """Of each layer; 0 in a dense one."""
    chosen: int = 0
    epsilon: float = 0.0
    most_tokens: float = float("inf")
    """Beyond, the modules multiply by whole bfloat16 matrices in another way."""
    watched: list[Watched] = field(default_factory=list)
    hooks: list[dict[int, Any]] = field(default_factory=list)

    def hold(self) -> bool:
        """Whether nothing was replaced, adapted or hooked since."""
        if any(self.hooks):
            return False
        for names, name, value in self.watched:  # noqa: SIM110 - a loop takes a third of the time of all()
            if names.get(name, GONE) is not value:
                return False
        return True

    def watch(self, module: nn.Module, name: str) -> Any:
        """What `name` stands for in a module, from now on watched."""
        for names in (module._parameters, module._buffers, module._modules, module.__dict__):
            if name in names:
                self.watched.append(Watched(names, name, names[name]))
                return names[name]
        raise UnsuitableError(name)


def take_addresses(layers: nn.ModuleList, dtype: torch.dtype) -> Addresses:
    """Of layers for tokens of `dtype`. Raises UnsuitableError where the kernels do not know one of them."""
    taken = Addresses(dtype=dtype)
    first: Any = layers[0]
    taken.epsilon = first.input_layernorm.eps
    taken.weights = (c.LayerWeights * len(layers))(*(_layer(taken, layer) for layer in layers))
    for module in layers.modules():
        taken.hooks += [module._forward_hooks, module._forward_pre_hooks]
        taken.watched += [Watched(module._modules, name, child) for name, child in module._modules.items()]
    if any(taken.hooks):
        raise UnsuitableError("hooks")
    return taken


def _layer(taken: Addresses, layer: Any) -> c.LayerWeights:
    attention = _known(layer.self_attn, Attention)
    weights = c.LayerWeights(
        input_norm=_norm(taken, layer.input_layernorm),
        post_norm=_norm(taken, layer.post_attention_layernorm),
        q=_linear(taken, attention.q_proj),
        k=_linear(taken, attention.k_proj),
        v=_linear(taken, attention.v_proj),
        o=_linear(taken, attention.o_proj),
    )
    if attention.lfa is not None:
        weights.filter_norm = _norm(taken, attention.lfa.norm)
        weights.conv1, weights.conv2 = (_linear(taken, conv) for conv in (attention.lfa.conv1, attention.lfa.conv2))
    dense = layer.mlp
    if isinstance(layer.mlp, MixtureOfExperts):
        _mixture(taken, layer.mlp, weights)
        dense = layer.mlp.shared_experts
    else:
        taken.experts.append(0)
    if dense is not None:
        both = _known(dense, DenseFeedForward)
        weights.dense_gate_up, weights.dense_down = _linear(taken, both.gate_up_proj), _linear(taken, both.down_proj)
    return weights


def _mixture(taken: Addresses, mixture: MixtureOfExperts, weights: c.LayerWeights) -> None:
    router, experts = mixture.router, mixture.experts
    if type(router) not in (AttentionRouter, LinearRouter) or taken.watch(router, "bias") is not None:
        raise UnsuitableError("a router that steers its balance")
    _without(taken, router, "lora")
    _without(taken, experts, "gate_up_proj_lora", "down_proj_lora")
    weights.relates = type(router) is AttentionRouter
    weights.router = c.matrix(_whole(taken, router, "weight"))
    if type(experts) is QuantizedExperts:
        down = _packed(taken, experts.down_proj)
        weights.gate_up, weights.down = c.matrix(_packed(taken, experts.gate_up_proj)), c.matrix(down)
        count = len(down.codes)
    else:
        both = _known(experts, Experts)
        down = _whole(taken, both, "down_proj")
        weights.gate_up, weights.down = c.matrix(_whole(taken, both, "gate_up_proj")), c.matrix(down)
        count = len(down)
    if count > native.MAX_EXPERTS or router.num_experts_per_tok != (taken.chosen or router.num_experts_per_tok):
        raise UnsuitableError("experts")
    taken.chosen = router.num_experts_per_tok
    taken.experts.append(count)


def _linear(taken: Addresses, module: Any) -> c.Matrix:
    _without(taken, module, "lora")
    if type(module) is QuantizedLinear:
        weight = _packed(taken, module.weight)
        if weight.codes.ndim != 3:
            raise UnsuitableError("a stack")
    else:
        weight = _whole(taken, _known(module, Linear), "weight")
    bias = taken.watch(module, "bias")
    return c.matrix(weight, None if bias is None else _vector(taken, bias))


def _norm(taken: Addresses, module: Any) -> int:
    if _known(module, RMSNorm).eps != taken.epsilon:
        raise UnsuitableError("norms that differ")
    return _vector(taken, taken.watch(module, "weight")).data_ptr()


def _packed(taken: Addresses, module: Any) -> Any:
    for name in ("codes", "scales"):
        if not taken.watch(_known(module, PackedMatrices), name).is_cpu:
            raise UnsuitableError("another device")
    return module.packed


def _whole(taken: Addresses, module: Any, name: str) -> Tensor:
    weight = taken.watch(module, name)
    one = torch.empty(1, weight.shape[-1], dtype=taken.dtype)
    if taken.watch(module, "token_exact") and native.suits_whole(one, weight):
        return weight
    if not native.suits_bf16(one, weight):
        raise UnsuitableError("a matrix in another dtype or place")
    if taken.dtype != torch.float32 or weight.nbytes > native.CACHED_BYTES:
        taken.most_tokens = native.BF16_UP_TO_TOKENS
    return weight


def _vector(taken: Addresses, vector: Tensor) -> Tensor:
    if vector.dtype != taken.dtype or not vector.is_cpu or not vector.is_contiguous():
        raise UnsuitableError("a vector in another dtype or place")
    return vector


def _without(taken: Addresses, module: nn.Module, *names: str) -> None:
    if any(taken.watch(module, name) is not None for name in names):
        raise UnsuitableError("adapters")


def _known(module: Any, kind: Any) -> Any:
    if type(module) is not kind:
        raise UnsuitableError(type(module).__name__)
    return module
