"""How evenly the experts of a layer work, from how often each was chosen: the one formula behind every number shown.

Legend: E experts. Not here: counting (`expert_load.py`), keeping experts even (`train/steps/balance.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """How evenly the experts of one layer work."""

    max_over_mean: float
    """Load of the busiest expert, as a multiple of an even share."""
    coefficient_of_variation: float
    """Standard deviation of the loads, as a multiple of an even share."""
    entropy: float
    """Of a choice, in nats; log(E) where the load is even."""
    effective_experts: float
    """Equally busy experts whose choice would be as uncertain: exp of the entropy."""
    dead_experts: int
    """Never chosen."""


def balance(load: Sequence[int]) -> Balance:
    """The balance of a layer whose experts were chosen `load` times each, [E]. Raises ValueError without a choice."""
    total, experts = sum(load), len(load)
    if not total:
        raise ValueError(f"none of {experts} experts was chosen, so there is no balance to speak of")
    shares = [count / total for count in load]
    entropy = abs(sum(share * math.log(share) for share in shares if share))  # never -0.0
    return Balance(
        max_over_mean=max(shares) * experts,
        coefficient_of_variation=math.sqrt(sum((share * experts - 1) ** 2 for share in shares) / experts),
        entropy=entropy,
        effective_experts=math.exp(entropy),
        dead_experts=shares.count(0),
    )
