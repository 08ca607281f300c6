"""Which matrices of a model LoRA adapts, and with how much: settings and roles, without torch.

Source: LoRA, arXiv 2106.09685; the scale of many ranks, arXiv 2312.03732.
Legend: O outputs, I inputs, E experts, R rank; a matrix is [O, I], a stack of them [E, O, I].
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from yuanmoe.errors import ConfigError, UsageError

Shape = tuple[int, ...]

HEAD = "lm_head.weight"
_MARKS = {
    "q": ".q_proj.",
    "k": ".k_proj.",
    "v": ".v_proj.",
    "o": ".o_proj.",
    "lfa": ".lfa.conv",
    "router": ".mlp.router.weight",
    "experts": ".mlp.experts.",
    "shared_experts": ".mlp.shared_experts.",
    "dense": ".mlp.",
    "head": HEAD,
}
"""What is in the name of a role's matrices; the first that fits counts."""
ROUTER = "router"
ROLES = tuple(role for role in _MARKS if role != ROUTER)
"""What can be a target; the router is a switch of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """Factors beside frozen matrices: what learns is B [O, R] and A [R, I] in W + scale B A."""

    section: ClassVar[str] = "lora"

    targets: tuple[str, ...] = ("q", "k", "v", "o", "experts")
    """Roles whose matrices are adapted, in every layer: q, k, v, o, lfa, experts, shared_experts, dense, head."""
    rank: int = 16
    """R; every expert has factors of this rank of its own."""
    alpha: float = 32.0
    """The scale is alpha / rank."""
    rslora: bool = False
    """The scale is alpha / sqrt(rank) instead, under which high ranks learn as fast as low ones."""
    dropout: float = 0.0
    """Share of what the factors see that is zeroed in training."""
    router: bool = False
    """Whether the routers are adapted too. Frozen by default: who works stays a matter of what a token is."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"lora.rank is {self.rank}; it must be at least 1")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"lora.alpha is {self.alpha}; it must be a number above 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout is {self.dropout}; it must be from 0 to below 1")
        unknown = [role for role in self.targets if role not in ROLES]
        if unknown:
            hint = "; the routers are lora.router=true" if ROUTER in unknown else ""
            raise ConfigError(f"lora.targets has {', '.join(unknown)}; known: {', '.join(ROLES)}{hint}")
        if not self.roles:
            raise ConfigError("lora.targets is empty; name at least one role, or adapt the routers: lora.router=true")

    @property
    def roles(self) -> tuple[str, ...]:
        return (*dict.fromkeys(self.targets), *([ROUTER] if self.router else ()))

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def lora_role_of(name: str) -> str | None:
    """The role of a matrix by its name; None for what cannot be adapted."""
    return next((role for role, mark in _MARKS.items() if mark in name), None)


def targets(matrices: Mapping[str, Shape], settings: LoraSettings) -> dict[str, Shape]:
    """Those of a model's `matrices` that are adapted. Raises UsageError for a role that it has no matrix of."""
    found = {name: shape for name, shape in matrices.items() if lora_role_of(name) in settings.roles}
    missing = [role for role in settings.roles if role not in map(lora_role_of, found)]
    if missing:
        present = [role for role in ROLES if role in map(lora_role_of, matrices)]
        raise UsageError(
            f"LoRA of {', '.join(missing)} matches nothing in this model, which has {', '.join(present)}; "
            "change lora.targets"
        )
    return found


def factor_shapes(matrix: Shape, rank: int) -> tuple[Shape, Shape]:
    """The shapes of A and B for a matrix or a stack of them."""
    *lead, rows, columns = matrix
    return (*lead, rank, columns), (*lead, rows, rank)


def num_parameters(matrix: Shape, rank: int) -> int:
    """What learns for a matrix or a stack of them."""
    return sum(map(math.prod, factor_shapes(matrix, rank)))
