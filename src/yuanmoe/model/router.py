"""Which experts a token visits: the Attention Router (arXiv 2405.17976 section 3) and the classical one beside it.

Projections run in the model's dtype, scores in float32 (spec 1.8). Legend: N tokens, D hidden, E experts, K chosen.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from yuanmoe.model.lora.low_rank import LowRank
from yuanmoe.ops import native
from yuanmoe.ops.products.linear import linear, token_exact_linear
from yuanmoe.ops.relations import relate


class Routing(NamedTuple):
    """For each token `weights` [N, K] float32 that sum to 1, `experts` [N, K], `logits` [N, E] float32."""

    weights: Tensor
    experts: Tensor
    logits: Tensor


def choose(
    logits: Float32[Tensor, "N E"], num_experts_per_tok: int, bias: Float[Tensor, " E"] | None = None
) -> Routing:
    """The experts with the largest `logits`, softmax over the chosen; ties go to the lowest index.

    `torch.topk` leaves ties open, and the Attention Router makes exact ones: experts with equal queries score equally.
    With a `bias` the experts with the largest share plus bias are chosen (arXiv 2408.15664 equation 3: the bias steers
    who works, and no gradient sees it); their weights stay those of the logits.
    """
    if bias is None and (kernels := native.single(logits)):
        return Routing(*kernels.choose(logits, num_experts_per_tok), logits)
    ranks = logits if bias is None else logits.detach().softmax(dim=-1) + bias
    order = ranks.argsort(dim=-1, descending=True, stable=True)
    experts = order[:, :num_experts_per_tok]
    return Routing(logits.gather(1, experts).softmax(dim=-1), experts, logits)


def attention_scores(projected: Float[Tensor, "N EEE"]) -> Float32[Tensor, "N E"]:
    """P_i = sum_j softmax_j(q_i k_j) v_j for `projected` = [q; k; v], each of width E, in any dtype."""
    if projected.shape[1] <= 3 * native.MAX_EXPERTS and (kernels := native.single(projected)):
        return kernels.relate(projected)
    q, k, v = projected.float().chunk(3, dim=-1)
    return relate(q, k, v)


class Projection(nn.Module):
    """What routers project tokens with: `weight` [rows, D], corrected by `lora` where there is one, and a `bias`."""

    bias: Tensor | None

    def __init__(self, rows: int, hidden_size: int, num_experts: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, hidden_size))
        self.register_buffer("bias", torch.zeros(num_experts) if bias else None)
        self.lora: LowRank | None = None
        self.token_exact = False
        """Whether a token's scores are the same bits in any company, as in a quantized model."""

    def project(self, x: Tensor) -> Tensor:
        out = token_exact_linear(x, self.weight) if self.token_exact else linear(x, self.weight)
        return out if self.lora is None else out + self.lora(x)


class AttentionRouter(Projection):
    """Scores experts by how they relate to one another for this token; weight [3E, D] = [query; key; value]."""

    def __init__(self, hidden_size: int, num_experts: int, num_experts_per_tok: int, bias: bool = False) -> None:
        super().__init__(3 * num_experts, hidden_size, num_experts, bias)
        self.num_experts_per_tok = num_experts_per_tok

    def forward(self, x: Tensor) -> Routing:
        return choose(attention_scores(self.project(x)), self.num_experts_per_tok, self.bias)


class LinearRouter(Projection):
    """The classical router: one score an expert, a dot product; weight [E, D]."""

    def __init__(self, hidden_size: int, num_experts: int, num_experts_per_tok: int, bias: bool = False) -> None:
        super().__init__(num_experts, hidden_size, num_experts, bias)
        self.num_experts_per_tok = num_experts_per_tok

    def forward(self, x: Tensor) -> Routing:
        return choose(self.project(x).float(), self.num_experts_per_tok, self.bias)
