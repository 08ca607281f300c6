"""Attention whose queries and keys see the input through Localized Filtering (LFA, arXiv 2311.15786 section 3).

Values see the unfiltered input. Source of the exact arithmetic: spec 1.3 to 1.6.
Legend: N tokens, D hidden, H heads, C head channels.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from yuanmoe.model.linear import Linear
from yuanmoe.model.norm import RMSNorm
from yuanmoe.model.state.sequences import FILTER_HIDDEN, FILTER_INPUT, Sequences
from yuanmoe.ops.rotary import rotate


class LocalizedFilter(nn.Module):
    """Two causal convolutions of two taps, a residual and a norm: token t sees t - 2, t - 1 and t.

    A convolution of two taps is one matrix over [previous token, current token]; zero stands before each sequence,
    separately for each convolution.
    """

    def __init__(self, layer_idx: int, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.conv1 = Linear(2 * hidden_size, hidden_size // 2, bias=True)
        self.conv2 = Linear(hidden_size, hidden_size, bias=True)
        self.norm = RMSNorm(hidden_size, eps)

    def forward(self, x: Float[Tensor, "N D"], sequences: Sequences) -> Float[Tensor, "N D"]:
        before = sequences.previous(x, self.layer_idx, FILTER_INPUT)
        hidden = self.conv1(torch.cat([before, x], dim=-1))
        before = sequences.previous(hidden, self.layer_idx, FILTER_HIDDEN)
        return self.norm(self.conv2(torch.cat([before, hidden], dim=-1)) + x)


class Attention(nn.Module):
    """Multi-head causal attention, all heads their own keys; weights are head-major, [H * C, D]."""

    def __init__(
        self,
        layer_idx: int,
        hidden_size: int,
        num_attention_heads: int,
        head_dim: int,
        lfa: LocalizedFilter | None,
        dropout: float,
    ) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_shape = (num_attention_heads, head_dim)
        self.dropout = dropout
        self.lfa = lfa
        self.q_proj = Linear(hidden_size, num_attention_heads * head_dim)
        self.k_proj = Linear(hidden_size, num_attention_heads * head_dim)
        self.v_proj = Linear(hidden_size, num_attention_heads * head_dim)
        self.o_proj = Linear(num_attention_heads * head_dim, hidden_size)

    def forward(
        self, x: Float[Tensor, "N D"], sequences: Sequences, rotary: tuple[Tensor, Tensor]
    ) -> Float[Tensor, "N D"]:
        filtered = x if self.lfa is None else self.lfa(x, sequences)
        q = rotate(self.q_proj(filtered).unflatten(-1, self.head_shape), rotary)
        k = rotate(self.k_proj(filtered).unflatten(-1, self.head_shape), rotary)
        v = self.v_proj(x).unflatten(-1, self.head_shape)
        out = sequences.attend(q, k, v, self.layer_idx, self.dropout if self.training else 0.0)
        return self.o_proj(out.flatten(-2))
