"""Experts at work, on a terminal: each token in the colour of the expert that weighed most, and the load of each layer.

Legend: T tokens, L layers with experts, K chosen, E experts.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from yuanmoe.cli.generate.answer import emit, visible
from yuanmoe.cli.terminal.output import people, print_table
from yuanmoe.config import ModelConfig
from yuanmoe.errors import UsageError
from yuanmoe.routing.balance import balance

if TYPE_CHECKING:
    from yuanmoe.engine.generate import TokenRouting
    from yuanmoe.lm import Stream

# The lighter colours of the 256 that every terminal has, no greys: black text is readable on all of them.
PALETTE = [16 + 36 * r + 6 * g + b for r, g, b in product(range(2, 6), repeat=3) if not r == g == b]
_STRIDE = 37  # Without a common divisor with the palette's 60, so that neighbouring experts look different.

BUSIEST = 4
"""Experts named for each layer."""


def expert_layers(config: ModelConfig) -> list[int]:
    """The layers that have experts. Raises UsageError when there are none."""
    layers = [layer for layer, experts in enumerate(config.experts_per_layer) if experts]
    if not layers:
        raise UsageError(f"--show-experts: none of the {config.num_hidden_layers} layers of this model has experts")
    return layers


def chosen_layer(config: ModelConfig, layer: int | None) -> int:
    """The place of a layer among those with experts; of the middle one by default. Raises UsageError."""
    layers = expert_layers(config)
    if layer is None:
        return len(layers) // 2
    if layer not in layers:
        raise UsageError(
            f"--expert-layer {layer} has no experts; the layers that have are {', '.join(map(str, layers))}"
        )
    return layers.index(layer)


def colour(expert: int) -> int:
    """The background of an expert among the 256 colours of a terminal."""
    return PALETTE[expert * _STRIDE % len(PALETTE)]


def coloured_writer(stream: "Stream", place: int) -> Callable[[str], None]:
    """Writes the pieces of `stream` to stdout, each on the colour of the first expert of the token that completed it.

    `place` is that of the layer among those with experts.
    """

    def write(piece: str) -> None:
        routing = stream.completion.routings[-1] if stream.completion.routings else None
        emit(coloured(visible(piece), None if routing is None else int(routing.experts[place, 0])))

    return write


def coloured(text: str, expert: int | None) -> str:
    """`text` on the colour of its expert, where stdout shows colours; plain without an expert."""
    if expert is None or not text or not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return text
    start, end = f"\x1b[30;48;5;{colour(expert)}m", "\x1b[0m"
    # A newline on a colour would paint the rest of the line.
    return f"{start}{text}{end}".replace("\n", f"{end}\n{start}")


def loads(routings: Sequence["TokenRouting"], num_layers: int) -> list[Counter[int]]:
    """How often each expert of each layer was chosen."""
    chosen = [routing.experts.tolist() for routing in routings]
    return [Counter(expert for token in chosen for expert in token[place]) for place in range(num_layers)]


def effective_experts(load: Counter[int]) -> float:
    """The number of equally busy experts whose choice would be as uncertain: exp of the load's entropy."""
    return balance(list(load.values())).effective_experts if load.total() else 0.0


def show_loads(routings: Sequence["TokenRouting"], config: ModelConfig, shown: int) -> None:
    """A table on stderr; the layer at place `shown` is the one whose experts gave the colours."""
    layers = expert_layers(config)
    rows = []
    for place, (layer, load) in enumerate(zip(layers, loads(routings, len(layers)), strict=True)):
        busiest = ", ".join(
            _share(expert, count / load.total(), place == shown) for expert, count in load.most_common(BUSIEST)
        )
        used = f"{len(load)} of {config.experts_per_layer[layer]}"
        rows.append([f"layer {layer}", used, f"{effective_experts(load):.1f}", busiest])
    title = f"Experts of {len(routings):,} tokens"
    print_table(people(), title, ["", "used", "effective", "busiest"], rows)


def _share(expert: int, share: float, with_colour: bool) -> str:
    name = f"[black on color({colour(expert)})] {expert} [/]" if with_colour else f"{expert}:"
    return f"{name} {share:.0%}"


def routings_json(routings: Sequence["TokenRouting"], config: ModelConfig) -> dict[str, Any]:
    """Layers [L], and of each token its experts [T, L, K] and their weights, rounded."""
    return {
        "layers": expert_layers(config),
        "experts": [routing.experts.tolist() for routing in routings],
        "weights": [[[round(w, 4) for w in layer] for layer in routing.weights.tolist()] for routing in routings],
    }
