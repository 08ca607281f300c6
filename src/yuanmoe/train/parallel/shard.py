"""A model spread over ranks as a layout says, and its weights put together again.

Layers go to their stages first (`stages.py`), then experts to their ranks (`expert_parallel.py`). Without stages FSDP2
may shard what is left by rows: each layer is a unit, its experts one of their own where they have other replicas, and
what is outside of the layers belongs to the whole model, whose part stays gathered between `read` and the loss, which
needs the output head.
Under FSDP2 stored weights are float32 masters; the model computes with what its dtype makes of them.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from yuanmoe.checkpoint.formats.mapping import layout
from yuanmoe.model.decoder import CausalLM, DecoderLayer
from yuanmoe.model.experts import MixtureOfExperts
from yuanmoe.train.parallel.expert_parallel import is_expert, shard_experts
from yuanmoe.train.parallel.ranks import ALONE, Ranks


def sharded(model: CausalLM, ranks: Ranks) -> CausalLM:
    """`model`, the same on all ranks, of which this one then holds what the layout gives it."""
    if ranks.stages is not None:
        ranks.stages.cut(model)
    if ranks.experts is not None:
        shard_experts(model, model.config, ranks.experts)
    if ranks.sharding == "fsdp" and ranks.data is not None:
        _fully_sharded(model, ranks)
    return model


def _fully_sharded(model: CausalLM, ranks: Ranks) -> None:
    weight = model.model.norm.weight
    dtype, device = weight.dtype, weight.device.type
    assert ranks.data is not None, "there are ranks to share with"
    everyone = DeviceMesh.from_group(ranks.data, device)
    alike = None if ranks.replicas is None else DeviceMesh.from_group(ranks.replicas, device)
    layers = [layer for layer in model.model.layers if isinstance(layer, DecoderLayer)]
    experts = [layer.mlp.experts for layer in layers if isinstance(layer.mlp, MixtureOfExperts)]
    # Experts that no other rank holds stay as they are.
    own = {parameter for each in experts for parameter in each.parameters()} if alike is None else set()
    for parameter in model.parameters():
        if parameter not in own:
            parameter.data = parameter.data.float()
    # Angles and routing stay in float32: inputs are not cast.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    shared = {"mp_policy": policy, "ignored_params": own}
    if ranks.experts is not None and alike is not None:
        for each in experts:
            _unit(each, alike, **shared)
    for layer in layers:
        _unit(layer, everyone, **shared)
    _unit(model, everyone, **shared, reshard_after_forward=False)
    register_fsdp_forward_method(model, "read")
    # `read` returns a view, which nothing changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def _unit(module: nn.Module, mesh: DeviceMesh, **options: Any) -> None:
    unit = cast(FSDPModule, fully_shard(module, mesh=mesh, **options))
    # Losses are divided by what all ranks learn from, so gradients are sums; gloo can only sum.
    unit.set_gradient_divide_factor(1.0)
    unit.set_force_sum_reduction_for_comms(True)


@contextmanager
def ready_to_use(model: CausalLM, ranks: Ranks = ALONE) -> Iterator[CausalLM | None]:
    """The model as it is in use, without dropout, for what calls its parts; all ranks must make the same passes.

    Of a pipeline the leading rank has a copy of the whole for as long as it is used, and the others have nothing to do.
    """
    if ranks.stages is not None:
        yield _assembled(model, ranks)
        return
    if isinstance(model, FSDPModule):
        model.unshard()
    model.eval()
    yield model
    model.train()
    if isinstance(model, FSDPModule):
        model.reshard()


def whole_weights(model: CausalLM, ranks: Ranks, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of the whole model in memory that nothing else uses; nothing on ranks that do not lead.

    One tensor at a time is gathered, by all ranks together.
    """
    if isinstance(model, FSDPModule):
        model.reshard()
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    whole: dict[str, Tensor] = {}
    for name, shape in layout(model.config).native.items():
        stored = state.get(name)
        tensor = None if stored is None else _whole(name, stored.detach(), ranks)
        if ranks.stages is not None and (holder := ranks.stages.holder(name)):
            tensor = _brought(tensor, holder, shape, model, ranks)
        if ranks.leads:
            assert tensor is not None, "the leading rank has it, or was brought it"
            rounded = tensor.to(dtype) if isinstance(stored, DTensor) else tensor
            whole[name] = rounded.to("cpu", copy=True)
    return whole


def _brought(
    tensor: Tensor | None, holder: int, shape: tuple[int, ...], model: CausalLM, ranks: Ranks
) -> Tensor | None:
    """A weight of another stage on the leading rank, which it goes to from the first data rank of that stage."""
    stages = ranks.stages
    assert stages is not None, "weights travel between stages"
    if ranks.leads:
        like = next(model.parameters())
        tensor = torch.empty(shape, dtype=like.dtype, device=like.device)
        dist.recv(tensor, group=stages.group, group_src=holder)
    elif stages.index == holder and not ranks.data_index:
        assert tensor is not None, "the stage has its weights"
        dist.send(tensor.contiguous(), group=stages.group, group_dst=0)
    return tensor


def _assembled(model: CausalLM, ranks: Ranks) -> CausalLM | None:
    """The whole model of a pipeline, on the leading rank."""
    like = next(model.parameters())
    weights = whole_weights(model, ranks, like.dtype)
    if not ranks.leads:
        return None
    with torch.device("meta"):
        whole = CausalLM(model.config)
    whole.load_state_dict({name: weight.to(like.device) for name, weight in weights.items()}, assign=True)
    return whole.eval()


def _whole(name: str, tensor: Tensor, ranks: Ranks) -> Tensor:
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    if ranks.experts is None or not is_expert(name):
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(ranks.experts.size())]
    dist.all_gather(parts, tensor.contiguous(), group=ranks.experts)
    return torch.cat(parts)
