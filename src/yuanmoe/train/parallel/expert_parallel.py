"""Expert parallelism: the experts of every layer spread over ranks, and tokens that travel to them and back.

Each rank of a group routes its own tokens over all E experts and holds E / R of them. Sorted by expert, its tokens are
sorted by rank too: one all-to-all takes them there, one takes the outputs back, and their gradients take the same ways
in reverse. The arithmetic is that of one device (`ops/products/grouped.py`); only who computes it changes.

A rank's experts see the tokens of the whole group, so that their gradient is the SUM over the group's ranks of what
each rank's loss says; all other parameters have that of the rank's own loss, and are for the caller to sum. Losses
divided by the count of the whole group's tokens give the gradients of one process that learns from all of them.

Sizes of the exchange are data, so each layer waits once for the device. All ranks of the group must make the same
passes at the same time, with any number of tokens, 0 included.
Source: arXiv 2006.16668 section 3. Legend: N tokens of this rank, M tokens for its experts, D hidden, E experts of a
layer, K chosen, R ranks.
"""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from yuanmoe.config import ModelConfig
from yuanmoe.model.experts import Experts, MixtureOfExperts
from yuanmoe.model.lora.low_rank import LowRank
from yuanmoe.model.router import Routing
from yuanmoe.ops.products.grouped import combine, dispatch, unsorted
from yuanmoe.plan.cluster.layout import check_expert_ranks

_Model = TypeVar("_Model", bound=nn.Module)


def shard_experts(model: _Model, config: ModelConfig, group: ProcessGroup) -> _Model:
    """`model`, whose layers with experts now hold those of this rank alone; routers and shared experts stay whole.

    Names stay the same; a stacked tensor [E, ...] becomes its rows `expert_rows(E, group)`. A model on the meta device
    works too. Raises UsageError where the ranks do not divide the experts of a layer.
    """
    check_expert_ranks(group.size(), config)
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            assert isinstance(module.experts, Experts), "experts in few bits are not for training"
            module.experts = ExpertsOfRank(module.experts, group)
    return model


def expert_rows(num_experts: int, group: ProcessGroup) -> slice:
    """Which of a layer's experts this rank holds."""
    share = num_experts // group.size()
    return slice(group.rank() * share, (group.rank() + 1) * share)


def is_expert(name: str) -> bool:
    """Whether the weight of that name is one of those that are spread, and not the same on all ranks."""
    return ".mlp.experts." in name


class ExpertsOfRank(Experts):
    """Some consecutive experts of a layer, [E / R, 2F, D] and [E / R, D, F], at work for the tokens of all ranks."""

    def __init__(self, whole: Experts, group: ProcessGroup) -> None:
        num_experts, _, hidden_size = whole.gate_up_proj.shape
        rows = expert_rows(num_experts, group)
        with torch.device("meta"):
            super().__init__(rows.stop - rows.start, hidden_size, whole.down_proj.shape[2])
        self.num_experts = num_experts
        self.gate_up_proj = _rows(whole.gate_up_proj, rows)
        self.down_proj = _rows(whole.down_proj, rows)
        self.gate_up_proj_lora = _factors_of_rows(whole.gate_up_proj_lora, rows)
        self.down_proj_lora = _factors_of_rows(whole.down_proj_lora, rows)
        self._group = group
        self.train(whole.training)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        sent = dispatch(x, routing.experts, self.num_experts)
        incoming = self._incoming(sent.counts)
        leaving, arriving = torch.stack([sent.counts.view_as(incoming).sum(1), incoming.sum(1)]).tolist()
        # From each rank come groups sorted by expert; the networks want one group for each expert.
        tokens = exchange(sent.tokens, leaving, arriving, self._group)
        experts = torch.arange(incoming.shape[1], device=x.device).repeat(len(incoming))
        here = dispatch(tokens, experts.repeat_interleave(incoming.flatten())[:, None], incoming.shape[1])
        outputs = unsorted(self.networks(here.tokens, here.counts), here.order)
        return combine(exchange(outputs, arriving, leaving, self._group), sent.order, routing.weights)

    def _incoming(self, counts: Tensor) -> Tensor:
        """How many tokens each rank has for each expert of this one, [R, E / R]."""
        incoming = torch.empty_like(counts)
        dist.all_to_all_single(incoming, counts, group=self._group)
        return incoming.view(self._group.size(), -1)


def exchange(rows: Tensor, leaving: list[int], arriving: list[int], group: ProcessGroup) -> Tensor:
    """`rows` [N, D] split into `leaving`, a part for each rank; the `arriving` parts for this one, in order of rank.

    Differentiable once: gradients go back where their rows came from.
    """
    return _Exchange.apply(rows, leaving, arriving, group)  # pyright: ignore[reportReturnType]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, leaving: list[int], arriving: list[int], group: ProcessGroup) -> Tensor:
        ctx.splits, ctx.group = (leaving, arriving), group
        return _all_to_all(rows, leaving, arriving, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        leaving, arriving = ctx.splits
        return _all_to_all(gradients[0], arriving, leaving, ctx.group), None, None, None


def _all_to_all(rows: Tensor, leaving: list[int], arriving: list[int], group: ProcessGroup) -> Tensor:
    out = rows.new_empty(sum(arriving), rows.shape[1])
    dist.all_to_all_single(out, rows.contiguous(), arriving, leaving, group=group)
    return out


def _rows(parameter: nn.Parameter, rows: slice) -> nn.Parameter:
    # A copy: a view would keep the experts of the other ranks in memory.
    return nn.Parameter(parameter.detach()[rows].clone(), parameter.requires_grad)


def _factors_of_rows(factors: LowRank | None, rows: slice) -> LowRank | None:
    if factors is None:
        return None
    return LowRank(factors.a.detach()[rows].clone(), factors.b.detach()[rows].clone(), factors.scale, factors.dropout)
