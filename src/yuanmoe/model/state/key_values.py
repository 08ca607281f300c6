"""The keys and values of one layer for the sequences of a cache, and attention to them.

Head-major, so that a head's past is one run of memory. In int8 each vector of a head has one float32 scale: half the
bytes of bfloat16, an error of at most 1/254 of the vector's largest channel.
Legend: N new tokens of all sequences, B sequences, S new tokens of one, T slots, H heads, C head channels.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from yuanmoe.errors import UsageError
from yuanmoe.ops import native
from yuanmoe.ops.attention import causal_attention
from yuanmoe.ops.quantize.groupwise import quantize_activations


class Slots:
    """A vector for each slot of each head: `values` [B, H, T, C], with `scales` [B, H, T] where they are codes."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device | str) -> None:
        if not (dtype.is_floating_point or dtype == torch.int8):
            raise UsageError(f"keys and values in {dtype}; they can be int8 or a floating-point type")
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.scales = torch.empty(shape[:3], device=device) if dtype == torch.int8 else None

    def write(self, rows: Int[Tensor, " N"], positions: Int[Tensor, " N"], x: Float[Tensor, "N H C"]) -> None:
        """Puts `x` into slot `positions[n]` of sequence `rows[n]`."""
        if kernels := native.storing(x, self.values):
            kernels.store(x, self.values, self.scales, rows, positions)
            return
        if self.scales is None:
            self.values[rows, :, positions] = x.to(self.values.dtype)
            return
        codes, scales = quantize_activations(x, x.shape[-1])
        self.values[rows, :, positions] = codes.squeeze(-2)
        self.scales[rows, :, positions] = scales[..., 0, 0]

    def read(self, rows: slice, length: int, dtype: torch.dtype) -> Float[Tensor, "B T H C"]:
        """The first `length` slots of some sequences."""
        values = self.values[rows, :, :length].to(dtype)
        if self.scales is not None:
            values = values * self.scales[rows, :, :length, None].to(dtype)
        return values.transpose(1, 2)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def select(self, index: Int[Tensor, " B"], filled: int) -> None:
        """Keeps the given sequences, with their first `filled` slots."""
        self.values = _selected(self.values, index, filled)
        if self.scales is not None:
            self.scales = _selected(self.scales, index, filled)


def _selected(slots: Tensor, index: Tensor, filled: int) -> Tensor:
    # The rest of the room stays untouched memory.
    kept = slots.new_empty(len(index), *slots.shape[1:])
    kept[:, :, :filled] = slots[index, :, :filled]
    return kept


def attend(
    q: Float[Tensor, "N H C"],
    keys: Slots,
    values: Slots,
    past: Sequence[int],
    new: Sequence[int],
    dropout: float = 0.0,
) -> Float[Tensor, "N H C"]:
    """Causal attention of the last `new[b]` tokens of each sequence to all its `past[b] + new[b]` slots."""
    if not dropout and native.suits_attention(q, keys.values, values.values):
        scales = None if keys.scales is None or values.scales is None else (keys.scales, values.scales)
        return native.attention(q, keys.values, values.values, past, new, scales)
    if len(set(past)) == 1 and len(set(new)) == 1:
        k, v = (slots.read(slice(None), past[0] + new[0], q.dtype) for slots in (keys, values))
        return causal_attention(q.view(len(new), -1, *q.shape[1:]), k, v, dropout).reshape(q.shape)
    parts = []
    for row, (mine, before, count) in enumerate(zip(q.split(list(new)), past, new, strict=True)):
        if count:
            k, v = (slots.read(slice(row, row + 1), before + count, q.dtype) for slots in (keys, values))
            parts.append(causal_attention(mine[None], k, v, dropout)[0])
    return torch.cat(parts)
