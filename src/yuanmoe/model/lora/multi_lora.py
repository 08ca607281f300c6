"""Several adapters beside one model; each token of a pass is corrected by one of them or by none.

Products with the weights are made for all tokens together, and what an adapter adds for its own tokens alone
(arXiv 2310.18547). Experts run once for the tokens of each adapter that adapts them and once for all others, since
their fused kernels know no factors: at few tokens an expert is seldom read twice. So what is computed for a token does
not depend on the adapters of others, and between passes the model is as it was, for the kernels that run it whole.
Not here: one adapter at a time, which may also learn (`lora.py`). Legend: N tokens, I inputs, O outputs, D hidden.
"""

import copy
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from yuanmoe.errors import UsageError
from yuanmoe.model.decoder import CausalLM
from yuanmoe.model.lora.attach import attached, low_ranks, place_of
from yuanmoe.model.lora.low_rank import LowRank
from yuanmoe.model.lora.targets import LoraSettings
from yuanmoe.model.router import Routing

NOBODY = -1
"""In the place of an adapter's number: the model itself."""


@runtime_checkable
class Trained(Protocol):
    """What is needed of an adapter; `checkpoint.adapters.adapter.Adapter` is one."""

    @property
    def settings(self) -> LoraSettings: ...
    @property
    def tensors(self) -> Mapping[str, Tensor]: ...


class MultiLora:
    """Adapters by name, numbered in their order; their factors are copied to the model's device once."""

    def __init__(self, model: CausalLM, adapters: Mapping[str, Trained]) -> None:
        """Raises UsageError for a model that has an adapter attached: it would be at work in every request."""
        if adapters and attached(model):
            raise UsageError("an adapter is attached to this model; detach it first, and name it among the others")
        self._device = model.device
        self._numbers = {name: number for number, name in enumerate(adapters)}
        self._turn = _Turn()
        factors: dict[str, dict[int, LowRank]] = {}
        for number, adapter in enumerate(adapters.values()):
            for target, low_rank in low_ranks(model, adapter.tensors, adapter.settings).items():
                factors.setdefault(target, {})[number] = low_rank.eval().requires_grad_(False)
        self._places = _places(model, factors, self._turn)

    def number(self, name: str | None) -> int:
        """What `at_work` calls an adapter, or none. Raises UsageError for a name that is not here."""
        if name is not None and name not in self._numbers:
            raise UsageError(f"there is no adapter {name!r}; loaded: {', '.join(self._numbers) or 'none'}")
        return NOBODY if name is None else self._numbers[name]

    @contextmanager
    def at_work(self, adapters: Int64[np.ndarray, " N"]) -> Iterator[None]:
        """While this lasts, the model is corrected by adapter `adapters[n]` at token n of what is put into it."""
        if not self._places:
            yield
            return
        groups = {int(number): (adapters == number).nonzero()[0] for number in np.unique(adapters)}
        self._turn.groups = {number: torch.from_numpy(rows).to(self._device) for number, rows in groups.items()}
        filled = [place for place in self._places if not place.adapters.isdisjoint(groups)]
        for place in filled:
            place.modules[place.name] = place.working
        try:
            yield
        finally:
            for place in filled:
                place.modules[place.name] = place.resting


class _Turn:
    """Which tokens of the pass are whose: row numbers by the number of the adapter."""

    groups: Mapping[int, Tensor] = {}


class _Place(NamedTuple):
    """A name among a module's children, and what it stands for while any of `adapters` is at work, and otherwise."""

    modules: dict[str, Any]
    name: str
    adapters: Set[int]
    working: nn.Module
    resting: nn.Module | None


class _MixedLowRank(nn.Module):
    """What the factors of one matrix add, each to the tokens of its own adapter; nothing to the others."""

    def __init__(self, turn: _Turn, factors: Mapping[int, LowRank]) -> None:
        super().__init__()
        self._turn = turn
        self._factors = factors
        self._outputs = next(iter(factors.values())).b.shape[0]

    def forward(self, x: Float[Tensor, "N I"]) -> Float[Tensor, "N O"]:
        mine = [(self._factors[number], rows) for number, rows in self._turn.groups.items() if number in self._factors]
        if len(mine) == len(self._turn.groups) == 1:
            return mine[0][0](x)
        out = x.new_zeros(len(x), self._outputs)
        for low_rank, rows in mine:
            out.index_copy_(0, rows, low_rank(x.index_select(0, rows)))
        return out


class _MixedExperts(nn.Module):
    """The experts of a layer, run for the tokens of each adapter by themselves."""

    def __init__(self, turn: _Turn, plain: nn.Module, adapted: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self._turn = turn
        self._adapted = adapted
        self.plain = plain

    def forward(self, x: Float[Tensor, "N D"], routing: Routing) -> Float[Tensor, "N D"]:
        groups, adapted = self._turn.groups, self._adapted
        parts = [(adapted[number], rows) for number, rows in groups.items() if number in adapted]
        if others := [rows for number, rows in groups.items() if number not in adapted]:
            parts.append((self.plain, torch.cat(others)))
        if len(parts) == 1:
            return parts[0][0](x, routing)
        out = torch.empty_like(x)
        for experts, rows in parts:
            chosen = Routing(*(part.index_select(0, rows) for part in routing))
            out.index_copy_(0, rows, experts(x.index_select(0, rows), chosen))
        return out


def _places(model: CausalLM, factors: Mapping[str, Mapping[int, LowRank]], turn: _Turn) -> list[_Place]:
    """Where the factors of each matrix, by its name and the number of the adapter, go."""
    places: list[_Place] = []
    twins: dict[str, dict[int, nn.Module]] = {}
    for target, by_adapter in factors.items():
        owner, slot = place_of(model, target)
        path, _, name = target.rpartition(".")
        if name == "weight":
            _claim(owner, slot)
            places.append(_Place(owner._modules, slot, set(by_adapter), _MixedLowRank(turn, by_adapter), None))
            continue
        of_layer = twins.setdefault(path, {})
        for number, low_rank in by_adapter.items():
            setattr(of_layer.setdefault(number, _twin(owner)), slot, low_rank)
    for path, of_layer in twins.items():
        parent, _, name = path.rpartition(".")
        modules = model.get_submodule(parent)._modules
        plain = model.get_submodule(path)
        places.append(_Place(modules, name, set(of_layer), _MixedExperts(turn, plain, of_layer), plain))
    return places


def _claim(owner: nn.Module, slot: str) -> None:
    """Has an empty slot among the children of a module, where it can be filled and emptied without a search."""
    setattr(owner, slot, nn.Identity())
    setattr(owner, slot, None)


def _twin(layer: nn.Module) -> nn.Module:
    """The same layer over the same weights, with slots of its own."""
    twin = copy.copy(layer)
    twin._modules = dict(layer._modules)
    return twin
