"""Rotary position embedding on the first channels of each head, half-split pairing (arXiv 2104.09864; spec 1.5).

Legend: N tokens, H heads, C head channels, R rotated channels (R <= C).
"""

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from yuanmoe.config import RopeAngles
from yuanmoe.ops import native


def rotary_tables(
    positions: Int[Tensor, " N"], rotary_dim: int, theta: float, angles: RopeAngles
) -> tuple[Float32[Tensor, "N half"], Float32[Tensor, "N half"]]:
    """Cosines and sines of every angle, each [N, R / 2] in float32.

    `positions` is [N], integer. `angles="bfloat16"` rounds frequencies, positions and products as the released HF
    code does: above position 256 neighbouring positions then share their angles.
    """
    dtype = torch.float32 if angles == "float32" else torch.bfloat16
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=positions.device) / rotary_dim
    frequencies = (1.0 / theta**exponents).to(dtype)
    products = positions.to(dtype)[:, None] * frequencies
    return products.cos().float(), products.sin().float()


def rotate(
    x: Float[Tensor, "N H C"], tables: tuple[Float32[Tensor, "N half"], Float32[Tensor, "N half"]]
) -> Float[Tensor, "N H C"]:
    """`x` [N, H, C] with channels i and i + R/2 of its first R rotated by the token's angles; computed in float32."""
    if kernels := native.single(x):
        return kernels.rotate(x, *tables)
    cos, sin = (table[:, None, :] for table in tables)
    half = cos.shape[-1]
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([rotated.to(x.dtype), rest], dim=-1)
