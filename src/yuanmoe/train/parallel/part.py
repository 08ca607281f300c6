"""What a rank holds of the optimizer's state of one parameter, and how that meets the other ranks.

| sharding | a rank's part | gradients | afterwards |
|---|---|---|---|
| replicated | all of it | summed over the ranks | nothing |
| optimizer | a range of the flattened tensor | summed, each rank gets its range | all ranges gathered by all |
| fsdp | the rows that FSDP2 gave it | were summed by FSDP2 | nothing: FSDP2 gathers weights as they are needed |

Of a pipeline these are the ranks of a stage. Where the embedding is tied, those of the first and the last stage share
it: its two copies get the same gradient and stay equal to the bit.

A part's master is float32. A parameter in float32 is its own master, or its range is a view of it; one in bfloat16 has
its master beside it. Gradients are SUMS over ranks: losses are divided by what all ranks learn from.
Sources: arXiv 1910.02054 (optimizer: its stage 1, fsdp: its stage 3).
"""

from abc import ABC, abstractmethod
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from yuanmoe.train.parallel.expert_parallel import is_expert
from yuanmoe.train.parallel.ranks import Ranks

# torch 2.13 renamed both and warns of the old names.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class StatePart(ABC):
    """A rank's part of a parameter's master."""

    def __init__(self, parameter: nn.Parameter, master: nn.Parameter, group: ProcessGroup | None) -> None:
        self.parameter, self.master, self.group = parameter, master, group
        self.start = 0
        """Where it begins in the flattened tensor."""
        self.is_range = False
        """Whether other ranks hold the rest."""
        self.rounds = parameter.dtype != torch.float32
        """Whether the weights that are saved are less exact than the master."""

    @property
    def holders(self) -> int:
        """Ranks that hold the very same part."""
        return 1

    @property
    def writes(self) -> bool:
        """Whether this rank is the one of them that saves it."""
        return True

    @abstractmethod
    def reduce(self) -> None:
        """Behind the last backward pass: makes the sum over all ranks the master's gradient."""

    @abstractmethod
    def publish(self) -> None:
        """Behind the optimizer's step: makes the masters of all ranks the parameter."""

    def forget(self) -> None:
        """Gives the gradients' memory back."""
        self.parameter.grad = self.master.grad = None


class WholePart(StatePart):
    """Everything; other ranks of the group do the same work."""

    def __init__(self, parameter: nn.Parameter, group: ProcessGroup | None) -> None:
        master = parameter
        if parameter.dtype != torch.float32:
            master = nn.Parameter(parameter.detach().float())
            _sum_in_float32(parameter, master)
        super().__init__(parameter, master, group)

    @property
    def holders(self) -> int:
        return 1 if self.group is None else self.group.size()

    @property
    def writes(self) -> bool:
        return self.group is None or self.group.rank() == 0

    def reduce(self) -> None:
        if self.group is not None:
            assert self.master.grad is not None, "every parameter that learns has a part in the loss"
            dist.all_reduce(self.master.grad, group=self.group)

    def publish(self) -> None:
        if self.master is not self.parameter:
            self.parameter.copy_(self.master)


class RangePart(StatePart):
    """An equal range of the flattened parameter."""

    def __init__(self, parameter: nn.Parameter, group: ProcessGroup) -> None:
        flat = parameter.detach().view(-1)
        self._range = -(-len(flat) // group.size())
        start = min(group.rank() * self._range, len(flat))
        own = flat[start : start + self._range]
        super().__init__(parameter, nn.Parameter(own.float()), group)
        self.start, self.is_range = start, True
        self._summed = parameter
        if parameter.dtype != torch.float32:
            self._summed = _Sum()
            _sum_in_float32(parameter, self._summed)

    def reduce(self) -> None:
        assert self._summed.grad is not None, "every parameter that learns has a part in the loss"
        whole = self._padded(self._summed.grad.flatten(), self._range * self._size)
        self._summed.grad = None
        own = whole.new_empty(self._range)
        _reduce_scatter(own, whole, group=self.group)
        self.master.grad = own[: len(self.master)]

    def publish(self) -> None:
        own = self._padded(self.master.detach().to(self.parameter.dtype), self._range)
        whole = own.new_empty(self._range * self._size)
        _all_gather(whole, own, group=self.group)
        self.parameter.copy_(whole[: self.parameter.numel()].view_as(self.parameter))

    @property
    def _size(self) -> int:
        assert self.group is not None, "a range is one of several"
        return self.group.size()

    @staticmethod
    def _padded(flat: Tensor, length: int) -> Tensor:
        return F.pad(flat, (0, length - len(flat)))


class RowsPart(StatePart):
    """The rows of a parameter that FSDP2 sharded."""

    def __init__(self, parameter: nn.Parameter, group: ProcessGroup, computed_in: torch.dtype) -> None:
        sharded = _sharded(parameter)
        super().__init__(parameter, nn.Parameter(sharded.to_local().detach()), group)
        rows = -(-sharded.shape[0] // group.size())
        self.start = min(group.rank() * rows, sharded.shape[0]) * (sharded.numel() // sharded.shape[0])
        self.is_range = True
        self.rounds = computed_in != torch.float32

    def reduce(self) -> None:
        sharded = _sharded(self.parameter)
        # FSDP2 may have moved its rows to other memory in the first pass.
        self.master.data = sharded.to_local().detach()
        gradient = sharded.grad
        assert isinstance(gradient, DTensor), "every parameter that learns has a part in the loss"
        self.master.grad = gradient.to_local()

    def publish(self) -> None:
        """Nothing: the master lies in the parameter's memory."""


def part_of(name: str, parameter: nn.Parameter, ranks: Ranks, computed_in: torch.dtype) -> StatePart:
    """This rank's part of a parameter of that name."""
    group = ranks.group_of(name)
    if isinstance(parameter, DTensor):
        assert group is not None, "rows are those of one rank among others"
        part = RowsPart(parameter, group, computed_in)
    elif group is not None and ranks.sharding == "optimizer":
        part = RangePart(parameter, group)
    else:
        part = WholePart(parameter, group)
    if ranks.experts is not None and is_expert(name):
        part.start += ranks.experts.rank() * parameter.numel()
        part.is_range = True
    return part


class _Sum:
    """Where gradients of a parameter in fewer bits are summed."""

    def __init__(self) -> None:
        self.grad: Tensor | None = None


def _sum_in_float32(parameter: nn.Parameter, into: Any) -> None:
    """Lets `into.grad` take over the parameter's gradients as soon as they are there."""

    def take(source: Tensor) -> None:
        assert source.grad is not None, "the hook runs after a gradient was accumulated"
        if into.grad is None:
            into.grad = source.grad.float()
        else:
            into.grad += source.grad
        source.grad = None

    parameter.register_post_accumulate_grad_hook(take)


def _sharded(parameter: nn.Parameter) -> DTensor:
    return cast(DTensor, parameter)
