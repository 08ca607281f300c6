"""Causal attention over runs of tokens, through torch SDPA; memory grows linearly with length.

Legend: N tokens of all runs, S tokens of one run, T keys of one run (T >= S), B sequences, H heads, C head channels.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def causal_attention(
    q: Float[Tensor, "B S H C"], k: Float[Tensor, "B T H C"], v: Float[Tensor, "B T H C"], dropout: float = 0.0
) -> Float[Tensor, "B S H C"]:
    """Attention of the last S of T positions to everything before them and themselves.

    The scale is 1 / sqrt(C).
    """
    S, T = q.shape[1], k.shape[1]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask = None
    if 1 < S < T:  # A chunk behind a past: the one case that needs a mask, of S x T booleans.
        mask = torch.ones(S, T, dtype=torch.bool, device=q.device).tril(T - S)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=S == T and S > 1)
    return out.transpose(1, 2)


def attend_padded(
    q: Float[Tensor, "B H C"], k: Float[Tensor, "B T H C"], v: Float[Tensor, "B T H C"], lengths: Int[Tensor, " B"]
) -> Float[Tensor, "B H C"]:
    """Attention of one token of each sequence to the first `lengths` of its T positions; the rest may hold anything."""
    filled = torch.arange(k.shape[1], device=q.device) < lengths[:, None]
    # Filled with zeros besides being masked: what was never written can be NaN, and NaN times 0 is NaN.
    k, v = (t.masked_fill(~filled[:, :, None, None], 0).transpose(1, 2) for t in (k, v))
    return F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=filled[:, None, None])[:, :, 0]


def attend_runs(
    q: Float[Tensor, "N H C"],
    k: Float[Tensor, "N H C"],
    v: Float[Tensor, "N H C"],
    lengths: list[int],
    dropout: float = 0.0,
) -> Float[Tensor, "N H C"]:
    """Causal attention inside each of several consecutive runs of tokens; runs do not see one another.

    N is the sum of `lengths`. Runs of one length share one call.
    """
    if len(set(lengths)) == 1:
        shape = (len(lengths), lengths[0], *q.shape[1:])
        return causal_attention(q.view(shape), k.view(shape), v.view(shape), dropout).reshape(q.shape)
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([causal_attention(a[None], b[None], c[None], dropout)[0] for a, b, c in parts])
