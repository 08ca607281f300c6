"""A model cut into the stages of a pipeline: each rank keeps some consecutive layers, and what they work between.

The first stage has the embedding, the last the final norm, the head and the loss. What is elsewhere is left out and
passes through, so that the names of all weights stay those of the whole model, for optimizers and checkpoints.

A tied head is a second copy of the embedding, on the last stage. Both stay equal when their gradients are summed before
each step, as the optimizer does (`part.py`).
Source of unequal stages: arXiv 2311.15786 section 3. Legend: B windows, S tokens of a window, N = B * S, D hidden.
"""

import re
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import P2POp, ProcessGroup

from yuanmoe.config import ModelConfig
from yuanmoe.errors import UsageError
from yuanmoe.model.decoder import CausalLM, DecoderLayer
from yuanmoe.model.router import Routing
from yuanmoe.model.state.sequences import Sequences
from yuanmoe.plan.cluster.layout import check_stages
from yuanmoe.plan.cluster.split import spans
from yuanmoe.train.steps.step import Windows, head_loss

EMBEDDING = "model.embed_tokens.weight"

_Model = TypeVar("_Model", bound=CausalLM)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """The stages of a pipeline whose ranks are `group`, in order."""

    config: ModelConfig
    """Of the whole model."""
    layers: tuple[int, ...]
    """How many each stage has."""
    group: ProcessGroup

    def __post_init__(self) -> None:
        check_stages(self.layers, self.config, self.group.size())
        if len(self.layers) != self.group.size():
            raise UsageError(f"{len(self.layers)} stages need as many ranks; this pipeline has {self.group.size()}")

    @property
    def index(self) -> int:
        """Of this rank's stage, from 0."""
        return self.group.rank()

    @property
    def count(self) -> int:
        return len(self.layers)

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1

    @property
    def own_layers(self) -> range:
        """This rank's."""
        return range(*spans(self.layers)[self.index])

    def holder(self, name: str) -> int:
        """The stage that has the weight of that name, the first of two."""
        if name == EMBEDDING:
            return 0
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        return self.count - 1 if layer is None else bisect(list(accumulate(self.layers)), int(layer[1]))

    def own_load(self, load: Sequence[Tensor]) -> list[Tensor]:
        """Of the load of all layers with experts that of this rank's."""
        each, own = self.config.experts_per_layer, self.own_layers
        first = sum(map(bool, each[: own.start]))
        return list(load[first : first + sum(map(bool, each[own.start : own.stop]))])

    def cut(self, model: _Model) -> _Model:
        """`model` without what other stages have. It may be on the meta device, and its weights come later."""
        for index in range(len(model.model.layers)):
            if index not in self.own_layers:
                model.model.layers[index] = Elsewhere()
        if not (self.is_first or (self.is_last and self.config.tie_word_embeddings)):
            model.set_submodule("model.embed_tokens", nn.Identity())
        if not self.is_last:
            model.set_submodule("model.norm", nn.Identity())
            model.head_lora = None
            if model.lm_head is not None:
                model.set_submodule("lm_head", nn.Identity())
        return model

    def forward(
        self, model: CausalLM, incoming: Tensor | None, windows: Windows, count: int
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """What this stage makes of `incoming` [N, D], which is None on the first: the next stage's input, or on the
        last the loss of `windows`, the sum over what is learned divided by `count`; and its layers' routings."""
        ids = windows.ids[:, :-1]
        x = model.model.embed_tokens(ids.flatten()) if incoming is None else incoming
        x, routings = model.model.through_layers(x, model.sequences(ids, windows.documents))
        if not self.is_last:
            return x, routings
        return head_loss(model, model.model.norm(x).view(*ids.shape, -1), windows, count), routings

    def sending(self, tensor: Tensor, stage: int) -> P2POp:
        """A message to another stage."""
        return P2POp(dist.isend, tensor, group=self.group, group_peer=stage)

    def receiving(self, tensor: Tensor, stage: int) -> P2POp:
        """One from there into `tensor`."""
        return P2POp(dist.irecv, tensor, group=self.group, group_peer=stage)


class Elsewhere(nn.Module):
    """The place of a layer that another stage has."""

    def forward(self, x: Tensor, sequences: Sequences, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, None]:  # noqa: ARG002
        return x, None


def state_dtype(model: CausalLM) -> torch.dtype:
    """Of what passes between layers: that of the norms, whatever the matrices have."""
    layer = next(layer for layer in model.model.layers if isinstance(layer, DecoderLayer))
    return layer.input_layernorm.weight.dtype
