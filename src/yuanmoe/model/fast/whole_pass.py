"""All layers of a decoder as one call of the compiled kernels, with the very numbers of its modules.

At one token Python takes a fifth of the time between the products: the weights that pass push it out of the caches, so
that each small operation costs 20 us. The kernels are those that the modules call one by one; this file only says which
weights a layer has, and `csrc/layers.cpp` goes through them. Whatever it does not know - adapters, hooks, a gradient,
other dtypes, another device - is left to the modules.
Legend: N tokens, L layers, D hidden, E experts, K chosen.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from yuanmoe.model.fast.addresses import Addresses, UnsuitableError, take_addresses
from yuanmoe.model.router import Routing
from yuanmoe.model.state.key_values import Slots
from yuanmoe.model.state.sequences import Sequences, StoredSequences, StoredState
from yuanmoe.ops import native
from yuanmoe.ops.native import structures as c

AT_ONCE_TOKENS = 16
"""More tokens go layer by layer: a prompt can then be interrupted between two of them."""


class WholePass:
    """Runs layers whose addresses it takes when they are first needed, and again when something changed.

    Copies, and what is loaded from a pickle, take their own.
    """

    def __init__(self) -> None:
        self._known: Addresses | None = None
        self._stored: tuple[list[Tensor | None], Any] = ([], None)

    def __reduce__(self) -> tuple[type["WholePass"], tuple[()]]:
        return WholePass, ()

    def run(
        self, layers: nn.ModuleList, x: Tensor, sequences: Sequences, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Routing, ...]] | None:
        """`x` [N, D] behind the last layer, and the routings; None where this is the modules' work."""
        if torch.is_grad_enabled() or layers.training or not isinstance(sequences, StoredSequences):
            return None
        kernels = native.single(x)
        known = self._addresses(layers, x.dtype) if kernels is not None else None
        if kernels is None or known is None or len(x) > known.most_tokens:
            return None
        state = sequences.stored()
        states = None if state is None else self._states(state, x.dtype)
        if state is None or states is None:
            return None
        x, count = x.clone(), len(layers)
        routings, routed = _room_for_routings(known, len(x))
        new_pass, _alive = _describe(known, state, x, rotary)
        step = count if len(x) <= AT_ONCE_TOKENS else 1
        for first in range(0, count, step):
            kernels.layers(known.weights, states, routed, slice(first, first + step), new_pass, x)
        return x, routings

    def _addresses(self, layers: nn.ModuleList, dtype: torch.dtype) -> Addresses | None:
        if self._known is None or self._known.dtype != dtype or not self._known.hold():
            try:
                self._known = take_addresses(layers, dtype)
            except UnsuitableError:
                self._known = None
        return self._known

    def _states(self, state: StoredState, dtype: torch.dtype) -> Any:
        """Where keys, values and tails of every layer are; None for what the kernels do not take."""
        tensors = [tensor for slots in (*state.keys, *state.values) for tensor in (slots.values, slots.scales)]
        tensors += [tail for tails in state.tails for tail in tails]
        seen, states = self._stored
        if len(seen) == len(tensors) and all(map(_same, seen, tensors)):
            return states
        stored = [slots.values for slots in (*state.keys, *state.values)]
        tails = [tail for tails in state.tails for tail in tails]
        if not all(t.is_cpu and t.is_contiguous() for t in (*stored, *tails)):
            return None
        if any(values.dtype not in c.STORED for values in stored) or any(tail.dtype != dtype for tail in tails):
            return None
        layers = zip(state.keys, state.values, state.tails, strict=True)
        states = (c.LayerState * len(state.keys))(*(_layer_state(*layer) for layer in layers))
        self._stored = tensors, states
        return states


def _same(one: object, other: object) -> bool:
    return one is other


def _layer_state(keys: Slots, values: Slots, tails: Sequence[Tensor]) -> c.LayerState:
    addresses = (ctypes.c_void_p * 2)(*(tail.data_ptr() for tail in tails))
    return c.LayerState(c.slots(keys.values, keys.scales), c.slots(values.values, values.scales), addresses)


def _room_for_routings(known: Addresses, tokens: int) -> tuple[tuple[Routing, ...], Any]:
    """Uninitialized routings of the layers with experts, and their addresses in all layers."""
    routed = [experts for experts in known.experts if experts]
    weights = torch.empty(len(routed), tokens, known.chosen).unbind(0)
    ids = torch.empty(len(routed), tokens, known.chosen, dtype=torch.int64).unbind(0)
    if len(set(routed)) == 1:
        logits = torch.empty(len(routed), tokens, routed[0]).unbind(0)
    else:
        logits = tuple(torch.empty(tokens, experts) for experts in routed)
    routings = tuple(map(Routing, weights, ids, logits))
    addresses = iter([c.Routed(*(part.data_ptr() for part in routing)) for routing in routings])
    places = [next(addresses) if experts else c.Routed() for experts in known.experts]
    return routings, (c.Routed * len(places))(*places)


def _describe(
    known: Addresses, state: StoredState, x: Tensor, rotary: tuple[Tensor, Tensor]
) -> tuple[c.LayerPass, tuple[object, ...]]:
    """The pass as the library sees it, and what must live as long."""
    B = len(state.new)
    cosines, sines = (table.contiguous() for table in rotary)
    past, new = (ctypes.c_int64 * B)(*state.past), (ctypes.c_int64 * B)(*state.new)
    described = c.LayerPass(
        tokens=len(x),
        sequences=B,
        width=x.shape[1],
        half=cosines.shape[1],
        chosen=known.chosen,
        epsilon=known.epsilon,
        past=ctypes.addressof(past),
        counts=ctypes.addressof(new),
        table=None if state.table is None else state.table.data_ptr(),
        table_width=1 if state.table is None else state.table.shape[1],
        pages=state.pages.data_ptr(),
        slots=state.slots.data_ptr(),
        tails=state.before.data_ptr(),
        kept=state.kept.data_ptr(),
        kept_in=state.kept_in.data_ptr(),
        num_kept=len(state.kept),
        cosines=cosines.data_ptr(),
        sines=sines.data_ptr(),
    )
    return described, (cosines, sines, past, new)
