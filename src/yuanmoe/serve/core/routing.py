"""Which experts tokens visited, for those who look: per token in compact form, and the running load of each layer.

Legend: N tokens, L layers with experts, K chosen, E experts of the largest layer.
"""

import base64
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from yuanmoe.config import ModelConfig
from yuanmoe.engine.requests import Stats, TokenRouting
from yuanmoe.routing.balance import balance


def routed_layers(config: ModelConfig) -> list[int]:
    """The layers that have experts, in order: the first dimension of everything here."""
    return [layer for layer, experts in enumerate(config.experts_per_layer) if experts]


def encode_routings(routings: Sequence[TokenRouting], start: int) -> dict[str, Any]:
    """Routings of consecutive tokens, the first at position `start` of its sequence.

    `experts` are ids (best first) and `weights` float32, both [N, L, K] in rows, little-endian, base64.
    """
    experts = torch.stack([routing.experts for routing in routings]).numpy()
    weights = torch.stack([routing.weights for routing in routings]).float().numpy()
    kind = "<u1" if experts.max(initial=0) < 256 else "<u2"
    return {
        "start": start,
        "shape": list(experts.shape),
        "expert_bits": 8 * np.dtype(kind).itemsize,
        "experts": base64.b64encode(experts.astype(kind).tobytes()).decode(),
        "weights": base64.b64encode(weights.astype("<f4").tobytes()).decode(),
    }


def load_statistics(config: ModelConfig, stats: Stats) -> dict[str, Any]:
    """Each layer's visits by expert since the server started, their entropy, and how far the busiest is above average.

    `entropy` is in bits beside its largest value, log2 of the experts; both it and `max_over_mean` are null without
    visits.
    """
    layers = []
    for place, layer in enumerate(routed_layers(config)):
        visits = stats.expert_load[place, : config.experts_per_layer[layer]].tolist()
        layers.append({"layer": layer, "visits": visits, **_balance(visits)})
    return {"experts_per_token": config.num_experts_per_tok, "computed_tokens": stats.computed_tokens, "layers": layers}


def _balance(visits: Sequence[int]) -> dict[str, float | None]:
    largest = math.log2(len(visits))
    if not any(visits):
        return {"entropy": None, "largest_entropy": largest, "max_over_mean": None}
    found = balance(visits)
    return {
        "entropy": found.entropy / math.log(2),
        "largest_entropy": largest,
        "max_over_mean": found.max_over_mean,
    }
