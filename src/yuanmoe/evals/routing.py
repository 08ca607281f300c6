"""Where the tokens of a text went: the load of experts, which work together, which tokens they like, whom they regard.

The expert-correlation matrix is the Attention Router's own: the shares A_ij with which expert i regards expert j
(arXiv 2405.17976 section 3), averaged over tokens. Memory is bounded: sums over tokens, and token counts of the text's
commonest kinds. Legend: N tokens, E experts, K chosen, T kinds of tokens.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from yuanmoe.model.decoder import CausalLM
from yuanmoe.model.router import AttentionRouter, LinearRouter, Routing
from yuanmoe.ops.products.linear import linear
from yuanmoe.ops.relations import relations
from yuanmoe.routing.balance import balance

MAX_KINDS = 4096
"""Different tokens that are counted for each expert, the commonest of the text: 24 layers of 32 experts take 13 MB."""
BLOCK_TOKENS = 256
"""Tokens whose E x E relations exist at once."""


class TextKinds:
    """The commonest tokens of a text, numbered; the rest share the last number."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.token_ids = [token_id for token_id, _ in Counter(ids).most_common(MAX_KINDS)]
        numbers = {token_id: number for number, token_id in enumerate(self.token_ids)}
        self.of_text = torch.tensor([numbers.get(token_id, len(self.token_ids)) for token_id in ids])
        """[len(ids)]"""
        self.count = len(self.token_ids) + 1


class LayerRecord:
    """What one layer's router did with the tokens so far; a forward hook of the router."""

    def __init__(self, layer: int, num_experts: int, kinds: TextKinds) -> None:
        self.layer = layer
        self.num_experts = num_experts
        self.kinds = kinds
        self.tokens = 0
        self.first_weights = 0.0
        self.together = torch.zeros(num_experts, num_experts, dtype=torch.int64)
        """Tokens that experts i and j both worked on, [E, E]; on the diagonal those of each."""
        self.relations: Tensor | None = None
        """Sum of A_ij over tokens, [E, E]; None unless there is an Attention Router."""
        self.by_kind = torch.zeros(num_experts * kinds.count, dtype=torch.int32)
        """Choices of each expert by kind of token, [E * T]."""

    def __call__(self, router: nn.Module, arguments: tuple[Tensor], routing: Routing) -> None:
        N = len(routing.experts)
        experts = routing.experts.cpu()
        chosen = torch.zeros(N, self.num_experts).scatter_(1, experts, 1.0)
        self.together += (chosen.T @ chosen).long()
        kinds = self.kinds.of_text[self.tokens : self.tokens + N]
        places = (experts * self.kinds.count + kinds[:, None]).flatten()
        self.by_kind += torch.bincount(places, minlength=len(self.by_kind)).int()
        self.first_weights += routing.weights[:, 0].sum().item()
        self.tokens += N
        if isinstance(router, AttentionRouter):
            summed = _summed_relations(router, arguments[0])
            self.relations = summed if self.relations is None else self.relations + summed


def _summed_relations(router: AttentionRouter, x: Tensor) -> Tensor:
    q, k, _ = linear(x, router.weight).float().chunk(3, dim=-1)
    blocks = zip(q.split(BLOCK_TOKENS), k.split(BLOCK_TOKENS), strict=True)
    return sum((relations(*block).sum(dim=0).double() for block in blocks), torch.zeros((), device=q.device)).cpu()


@contextmanager
def recorded(model: CausalLM, ids: Sequence[int]) -> Iterator[list[LayerRecord]]:
    """One record for each layer with experts, filled while the model reads `ids` from its first token on."""
    kinds = TextKinds(ids)
    records = []
    with ExitStack() as hooks:
        for layer, experts in enumerate(model.config.experts_per_layer):
            if experts:
                records.append(LayerRecord(layer, experts, kinds))
                router = model.get_submodule(f"model.layers.{layer}.mlp.router")
                assert isinstance(router, AttentionRouter | LinearRouter)
                hooks.enter_context(router.register_forward_hook(records[-1]))
        yield records


def layer_summary(record: LayerRecord) -> dict[str, Any]:
    """A layer's load in numbers: JSON values."""
    choices = record.together.diagonal().double()
    load = choices / choices.sum()
    found = balance(choices.long().tolist())
    return {
        "layer": record.layer,
        "experts": record.num_experts,
        "load": _rounded(load),
        "max_over_mean": _round(found.max_over_mean),
        "variation": _round(found.coefficient_of_variation),
        "entropy_nats": _round(found.entropy),
        "effective_experts": _round(found.effective_experts),
        "dead_experts": (choices == 0).nonzero().flatten().tolist(),
        "first_weight": _round(record.first_weights / record.tokens),
        "pairs": pairs(record),
    }


def pairs(record: LayerRecord, count: int = 3) -> list[dict[str, Any]]:
    """The experts that work together most beyond chance: what their loads alone would make of it."""
    choices = record.together.diagonal().double()
    chance = torch.outer(choices, choices).triu(1)
    observed = record.together.double().triu(1)
    chance *= observed.sum() / chance.sum().clamp(min=1)
    return [
        {
            "experts": list(divmod(place, record.num_experts)),
            "tokens": int(observed.flatten()[place]),
            "times_chance": _round(times_chance),
        }
        for place, times_chance in _outstanding(observed.flatten(), chance.flatten(), count)
    ]


def favourites(record: LayerRecord, count: int = 6) -> list[list[dict[str, Any]]]:
    """For each expert the tokens that came to it most beyond chance, [E] lists of up to `count`."""
    by_kind = record.by_kind.view(record.num_experts, -1)[:, :-1].double()
    load = record.together.diagonal().double() / record.together.diagonal().sum()
    chance = load[:, None] * by_kind.sum(dim=0)
    return [
        [
            {"token_id": record.kinds.token_ids[kind], "tokens": int(mine[kind]), "times_chance": _round(times_chance)}
            for kind, times_chance in _outstanding(mine, expected, count)
        ]
        for mine, expected in zip(by_kind, chance, strict=True)
    ]


def _outstanding(observed: Tensor, expected: Tensor, count: int) -> list[tuple[int, float]]:
    """Places above chance with the most evidence (their terms of the G-test), and their ratio to chance."""
    evidence = torch.special.xlogy(observed, observed / expected.clamp(min=1e-9))
    # Seen once is no habit.
    evidence = evidence.masked_fill(observed < 2, 0)
    best = evidence.topk(min(count, len(evidence)))
    ranked = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [(place, (observed[place] / expected[place]).item()) for place, value in ranked if value > 0]


def expert_matrices(record: LayerRecord) -> dict[str, list[list[float]] | None]:
    """`together`: the share of row i's tokens that also went to j. `relations`: the mean A_ij, if there is one."""
    choices = record.together.diagonal().double()
    together = record.together.double() / choices.clamp(min=1)[:, None]
    related = None if record.relations is None else record.relations / record.tokens
    return {
        "together": [_rounded(row) for row in together.fill_diagonal_(0)],
        "relations": None if related is None else [_rounded(row) for row in related],
    }


def _rounded(values: Tensor) -> list[float]:
    return [_round(value) for value in values.tolist()]


def _round(value: float) -> float:
    return round(value, 4)
