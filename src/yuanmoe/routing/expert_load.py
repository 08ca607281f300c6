"""How often each expert was visited, counted beside passes of the model without costing them time.

Legend: N tokens of a pass, L layers with experts, K chosen, E experts of the largest layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from yuanmoe.model.router import Routing

COUNT_TOKENS = 4096
"""Counted together: five small tensor operations a pass would be 2 % of a step of a small model."""


class ExpertLoad:
    """Visits of each expert since it was made."""

    def __init__(self, experts_per_layer: Sequence[int], device: torch.device) -> None:
        """`experts_per_layer` has a 0 for a dense layer, which is left out."""
        layers = [count for count in experts_per_layer if count]
        self._counts = torch.zeros(len(layers), max(layers, default=0), dtype=torch.int64, device=device)
        self._uncounted: list[tuple[Routing, ...]] = []
        self._num_uncounted = 0

    def add(self, routings: tuple[Routing, ...]) -> None:
        """A pass: the routing of each layer with experts."""
        if routings:
            self._uncounted.append(routings)
            self._num_uncounted += len(routings[0].experts)
            if self._num_uncounted >= COUNT_TOKENS:
                self._count()

    def counts(self) -> Tensor:
        """[L, E] int64 on the CPU."""
        if self._uncounted:
            self._count()
        return self._counts.cpu().clone()

    def _count(self) -> None:
        for row, layer in zip(self._counts, zip(*self._uncounted, strict=True), strict=True):
            visits = torch.cat([routing.experts for routing in layer]).flatten()
            row.scatter_add_(0, visits, torch.ones_like(visits))
        self._uncounted = []
        self._num_uncounted = 0
