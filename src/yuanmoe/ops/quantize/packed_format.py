"""The packed layout of `ops.quantize.groupwise` without the numbers: what shapes codes and scales have, and single
rows out of them.

Legend: B blocks of 16 rows, G groups of a row, N rows asked for, I inputs (columns).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from yuanmoe.ops.quantize.groupwise import BLOCK_ROWS, PackedTensor, check_format


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedFormat:
    """Equal matrices [*lead, rows, columns] in 4 or 8 bits. Raises UsageError for a format that no kernel knows."""

    lead: tuple[int, ...]
    rows: int
    columns: int
    bits: int
    group_size: int

    def __post_init__(self) -> None:
        check_format(self.bits, self.group_size)

    @property
    def matrices(self) -> int:
        return math.prod(self.lead)

    @property
    def groups(self) -> int:
        """Groups of one row, the last one padded."""
        return -(-self.columns // self.group_size)

    @property
    def codes_shape(self) -> tuple[int, ...]:
        return (*self._grid, BLOCK_ROWS * self.group_size * self.bits // 8)

    @property
    def scales_shape(self) -> tuple[int, ...]:
        return (*self._grid, BLOCK_ROWS)

    @property
    def _grid(self) -> tuple[int, ...]:
        return (*self.lead, -(-self.rows // BLOCK_ROWS), self.groups)

    @property
    def nbytes(self) -> int:
        """Of codes and scales together."""
        return math.prod(self.codes_shape) + 2 * math.prod(self.scales_shape)

    def tensor(self, codes: Tensor, scales: Tensor) -> PackedTensor:
        """These codes and scales as weights, not copied. Raises UsageError where they have other shapes."""
        return PackedTensor(
            codes=_shaped(codes, self.codes_shape),
            scales=_shaped(scales, self.scales_shape),
            bits=self.bits,
            group_size=self.group_size,
            out_features=self.rows,
            in_features=self.columns,
        )


def _shaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    # The very tensor where it fits, so that what was made of it can be told from what was made of another.
    return tensor if tensor.shape == shape else tensor.view(shape)


def take_rows(weight: PackedTensor, rows: Int[Tensor, " N"]) -> Float[Tensor, "N I"]:
    """Some rows of one matrix in float32, each exactly code times scale; reads no others."""
    block, lane = rows // BLOCK_ROWS, rows % BLOCK_ROWS
    chunks = weight.codes.unflatten(-1, (-1, BLOCK_ROWS, 4))[block, :, :, lane]
    if weight.bits == 8:
        codes = chunks.view(torch.int8)
    else:
        codes = torch.stack([chunks & 15, chunks >> 4], dim=-2).view(torch.int8) - 8
    scales = weight.scales[block, :, lane].float()
    # Contiguous for any number of rows, where inputs are padded too: the kernels take nothing else.
    return (codes.flatten(2) * scales[..., None]).flatten(1)[:, : weight.in_features].contiguous()
