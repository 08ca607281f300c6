"""The feed-forward half of a layer: one dense SwiGLU network, or routed experts with shared ones beside them.

Sources: arXiv 2405.17976 section 3; spec 1.9 (the first half of the fused matrix carries SiLU) and 1.10.
Legend: N tokens, D hidden, E experts, F expert width.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from yuanmoe.model.linear import Linear
from yuanmoe.model.lora.low_rank import LowRank, factors_of
from yuanmoe.model.router import AttentionRouter, LinearRouter, Routing
from yuanmoe.ops.products.grouped import expert_networks, experts_forward, swiglu


class DenseFeedForward(nn.Module):
    """down(silu(gate) * up), with gate and up in one matrix [2F, D]."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        return self.down_proj(swiglu(self.gate_up_proj(x)))


class Experts(nn.Module):
    """All experts of a layer, stacked: gate_up_proj [E, 2F, D], down_proj [E, D, F]; each may have factors beside."""

    def __init__(self, num_experts: int, hidden_size: int, moe_intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * moe_intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, moe_intermediate_size))
        self.gate_up_proj_lora: LowRank | None = None
        self.down_proj_lora: LowRank | None = None
        self.token_exact = False
        """Whether a token's result is the same bits in any company, as in a quantized model."""

    def forward(self, x: Float[Tensor, "N D"], routing: Routing) -> Float[Tensor, "N D"]:
        return experts_forward(
            x,
            self.gate_up_proj,
            self.down_proj,
            routing.weights,
            routing.experts,
            factors_of(self.gate_up_proj_lora),
            factors_of(self.down_proj_lora),
            token_exact=self.token_exact,
        )

    def networks(self, tokens: Float[Tensor, "M D"], counts: Int[Tensor, " E"]) -> Float[Tensor, "M D"]:
        """What each expert makes of its group of `counts` tokens, unweighted, for whoever dispatches them elsewhere."""
        return expert_networks(
            tokens,
            counts,
            self.gate_up_proj,
            self.down_proj,
            factors_of(self.gate_up_proj_lora),
            factors_of(self.down_proj_lora),
        )


class MixtureOfExperts(nn.Module):
    """Router, its experts, and experts that every token passes if there are any."""

    def __init__(
        self, router: AttentionRouter | LinearRouter, experts: Experts, shared_experts: DenseFeedForward | None
    ) -> None:
        super().__init__()
        self.router = router
        self.experts: nn.Module = experts
        self.shared_experts = shared_experts

    def forward(self, x: Float[Tensor, "N D"]) -> tuple[Float[Tensor, "N D"], Routing]:
        routing = self.router(x)
        y = self.experts(x, routing)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return y, routing
