"""The ranks of a training run: who this one is, whom it shares what with, and what all of them agree on.

Data ranks see different windows, and are neighbours; the ranks of a pipeline take the same windows through its stages,
and are as many apart as there are data ranks. `ep` neighbouring data ranks hold all experts of their stage together, so
that those `ep` apart hold the same ones. A run of one process is `ALONE`, for which all of this does nothing.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, Self, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from yuanmoe.checkpoint.load import usable_device
from yuanmoe.config import ModelConfig
from yuanmoe.errors import ResourceError, TrainingError
from yuanmoe.plan.cluster.layout import Layout
from yuanmoe.train.parallel.expert_parallel import is_expert
from yuanmoe.train.parallel.stages import EMBEDDING, Stages

TIMEOUT = timedelta(minutes=10)
"""After so long without an answer a rank takes the others to be dead. A save, a sample or a first compilation of one
rank may take minutes."""


class _Rows(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, rows: slice, /) -> Self: ...


_RowsT = TypeVar("_RowsT", bound=_Rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This rank among the others."""

    rank: int = 0
    size: int = 1
    layout: Layout | None = None
    everyone: ProcessGroup | None = None
    """All; None where there is no other."""
    data: ProcessGroup | None = None
    """Those that see other windows in the same stage; None where there is no other."""
    experts: ProcessGroup | None = None
    """Those that hold the experts of the stage together; None where this rank has them all."""
    replicas: ProcessGroup | None = None
    """Those that hold the same experts; None where there is no other."""
    ends: ProcessGroup | None = None
    """Those of the first and the last stage, which both hold a tied embedding; None where this is no such rank."""
    stages: Stages | None = None
    """Of the pipeline that this rank is in; None where it has all layers."""

    @property
    def leads(self) -> bool:
        """Whether this one shows, logs and writes."""
        return self.rank == 0

    @property
    def sharding(self) -> str:
        return "replicated" if self.layout is None else self.layout.sharding

    @property
    def num_data(self) -> int:
        """How many divide the windows of a step."""
        return 1 if self.data is None else self.data.size()

    @property
    def data_index(self) -> int:
        """Of this one among them, from 0."""
        return 0 if self.data is None else self.data.rank()

    @property
    def shares_state(self) -> bool:
        """Whether ranks hold something of the optimizer that others lack."""
        shared = self.sharding != "replicated" or self.experts is not None or self.stages is not None
        return self.size > 1 and shared

    def group_of(self, name: str) -> ProcessGroup | None:
        """The ranks that hold a weight of that name, or rows of it; None where there is no other."""
        if self.experts is not None and is_expert(name):
            return self.replicas
        return self.ends if name == EMBEDDING and self.ends is not None else self.data

    def share(self, rows: _RowsT) -> _RowsT:
        """This rank's part of rows that the data ranks divide."""
        share = len(rows) // self.num_data
        return rows[self.data_index * share : (self.data_index + 1) * share]

    def sum(self, values: Tensor) -> Tensor:
        """`values` summed over all ranks, in place."""
        if self.everyone is not None:
            dist.all_reduce(values, group=self.everyone)
        return values

    def sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Small tensors summed over the data ranks in one message, exact for whole numbers below 2^53."""
        if self.data is None:
            return list(tensors)
        flat = torch.cat([tensor.detach().flatten().double() for tensor in tensors])
        dist.all_reduce(flat, group=self.data)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(like.shape).to(like.dtype) for part, like in zip(parts, tensors, strict=True)]

    def first(self, number: float) -> float:
        """What the leading rank says."""
        if self.everyone is None:
            return number
        said = torch.tensor(number, dtype=torch.float64)
        dist.broadcast(said, 0, group=self.everyone)
        return said.item()

    def most(self, number: int) -> int:
        """The highest that any rank says."""
        if self.everyone is None:
            return number
        said = torch.tensor(number)
        dist.all_reduce(said, dist.ReduceOp.MAX, group=self.everyone)
        return int(said)

    def all(self, said: Any, group: ProcessGroup | None = None) -> list[Any]:
        """What every rank says, in order; `group` is another one of all ranks."""
        if self.everyone is None:
            return [said]
        heard: list[Any] = [None] * self.size
        dist.all_gather_object(heard, said, group=group or self.everyone)
        return heard

    def wait(self) -> None:
        """Until all ranks are here."""
        self.all(None)


ALONE = Ranks()


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_place() -> tuple[int, int]:
    """This process among those of its machine, and their number."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def joined(layout: Layout, config: ModelConfig, device: torch.device) -> Iterator[Ranks]:
    """The ranks that torchrun started, in this layout for a model, until the block ends.

    Raises TrainingError on those that are left where one of them is gone.
    """
    if world_size() == 1:
        yield Ranks(layout=layout)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # What is agreed on lies in the CPU's memory, whatever the model computes on.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        ranks = grouped(layout, config)
        ranks.wait()  # A rank that refuses its call ends at once, and breaks connections which others are still making.
        yield ranks
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        said = str(error).splitlines()[0]
        raise TrainingError(
            f"another process of this run has ended or does not answer ({said}); what it said is above or in its log. "
            "The last checkpoint is whole: the same command with --resume goes on from there"
        ) from error
    # Not after an error: the others may be waiting for this rank, and torchrun ends them.
    dist.destroy_process_group()


def _is_lost(error: RuntimeError) -> bool:
    """Whether a message to another rank failed; NCCL has errors of its own for that, gloo has its name in the text."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def grouped(layout: Layout, config: ModelConfig) -> Ranks:
    """The ranks of the default process group in this layout for a model."""
    rank, size, ep = dist.get_rank(), dist.get_world_size(), layout.experts
    assert size == layout.data * layout.stages, "the layout was made for these ranks"
    stages = [range(first, first + layout.data) for first in range(0, size, layout.data)]
    experts = [range(first, first + ep) for first in range(0, size, ep)]
    replicas = [stage[first::ep] for stage in stages for first in range(ep)]
    pipeline = _own([range(first, size, layout.data) for first in range(layout.data)], rank)
    has_ends = config.tie_word_embeddings and layout.stages > 1
    return Ranks(
        rank=rank,
        size=size,
        layout=layout,
        everyone=dist.group.WORLD if size > 1 else None,
        data=_own(stages, rank),
        experts=_own(experts, rank),
        replicas=_own(replicas, rank),
        ends=_own([[*stages[0], *stages[-1]]], rank) if has_ends else None,
        stages=None if pipeline is None else Stages(config=config, layers=layout.layers, group=pipeline),
    )


def _own(groups: Sequence[Sequence[int]], rank: int) -> ProcessGroup | None:
    """The group that has this rank, if it has another one; all ranks make all groups, in the same order."""
    if len(groups[0]) == 1:
        return None
    if len(groups[0]) == dist.get_world_size():
        return dist.group.WORLD
    made = [new_group(list(members)) for members in groups]
    return next((group for group, members in zip(made, groups, strict=True) if rank in members), None)


def new_group(
    members: list[int] | None = None, backend: str | None = None, timeout: timedelta = TIMEOUT
) -> ProcessGroup:
    """A group of these ranks, or of all; every rank makes every group."""
    return cast(ProcessGroup, dist.new_group(members, timeout, backend))


def local_device(name: str | None) -> torch.device:
    """Where this process computes: what was asked for, or a GPU of its own where there is one."""
    place, local = local_place()
    kind = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind != "cuda" or local == 1:
        return usable_device(name)
    if local > torch.cuda.device_count():
        raise ResourceError(
            f"{local} processes want a GPU each, this machine has {torch.cuda.device_count()}; start fewer with "
            "--nproc-per-node, or add --device cpu"
        )
    return torch.device("cuda", place)
