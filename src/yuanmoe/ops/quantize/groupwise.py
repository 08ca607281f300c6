"""Group-wise symmetric 4-bit and 8-bit weights: quantize, pack for the kernels, and the plain arithmetic of both.

A weight is code x scale: signed codes, one fp16 scale for `group_size` neighbouring inputs of a row. Activations are
quantized to 8 bits on the fly with one float32 scale a group, so that an outlier channel costs precision only in its
own group (measured on inputs with channels 30 times larger: 36 dB at group 64, 24 dB with one scale a token).
fp16 scales, because bf16 ones lose up to 0.07 dB at 8 bits, float32 ones gain 0.001 dB for 6 % more bytes, and GPTQ
files carry fp16, so they import without loss.

The packed layout is drawn in `native/csrc/layout.h`; `pack_weight` pads rows to 16 with zero scales and inputs to
whole groups with zero codes, so any shape fits. This module is the reference and the fallback of `ops.native`; it is
not fast. Legend: N tokens, O outputs (rows), I inputs (columns), G groups of a row, B blocks of 16 rows, E experts, F
expert width, D hidden, K chosen.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from yuanmoe.errors import UsageError

Method = Literal["rtn", "mse"]

BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)
BLOCK_ROWS = 16
CHUNK_ELEMENTS = 1 << 18
"""Weights quantized at a time: what is in between stays in a core's cache (a scale tried: 1.5 against 10 ns)."""
SHRINKS = (1.06, 1.0, 0.94, 0.88, 0.82, 0.76)
"""Scales tried by `mse`, relative to the one that just reaches the largest weight."""
REFINEMENTS = 2
"""Least-squares steps of `mse` from the best of them: within 0.03 dB at 4 bits of an exhaustive search."""
SMALLEST_SCALE = 2.0**-24
LARGEST_SCALE = 65504.0
EMPTY_BELOW = 1e-30
"""Groups of activations that never exceed this count as zeros; 127 over it is still a float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedTensor:
    """Weights [..., O, I] as codes (int8, [..., O, I]) and scales (fp16, [..., O, G])."""

    codes: Tensor
    scales: Tensor
    bits: int
    group_size: int

    def __post_init__(self) -> None:
        check_format(self.bits, self.group_size)
        _check_tensor("codes", self.codes, torch.int8, tuple(self.codes.shape))
        groups = -(-self.codes.shape[-1] // self.group_size)
        _check_tensor("scales", self.scales, torch.float16, (*self.codes.shape[:-1], groups))


# Compared by identity, so that what is derived from one can be kept as long as it lives.
@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class PackedTensor:
    """The same weights laid out for the kernels: codes (uint8, [..., B, G, bytes]), scales (fp16, [..., B, G, 16])."""

    codes: Tensor
    scales: Tensor
    bits: int
    group_size: int
    out_features: int
    in_features: int

    def __post_init__(self) -> None:
        check_format(self.bits, self.group_size)
        grid = (-(-self.out_features // BLOCK_ROWS), -(-self.in_features // self.group_size))
        lead = tuple(self.codes.shape[:-3])
        _check_tensor("codes", self.codes, torch.uint8, (*lead, *grid, BLOCK_ROWS * self.group_size * self.bits // 8))
        _check_tensor("scales", self.scales, torch.float16, (*lead, *grid, BLOCK_ROWS))
        if not self.codes.is_contiguous() or not self.scales.is_contiguous():
            raise UsageError("packed codes and scales must be contiguous; call .contiguous() on what was sliced")

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


def check_format(bits: int, group_size: int) -> None:
    """Raises UsageError for a format that the kernels do not know."""
    if bits not in BITS:
        raise UsageError(f"{bits} bits; quantized weights have 4 or 8")
    if group_size not in GROUP_SIZES:
        raise UsageError(f"group size {group_size}; it must be 32, 64 or 128")


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise UsageError(
            f"quantized {name} are {tensor.dtype} {list(tensor.shape)}; this format needs {dtype} {list(shape)}"
        )


def quantize_weight(
    weight: Float[Tensor, "*E O I"], bits: int, group_size: int, method: Method = "rtn"
) -> QuantizedTensor:
    """Codes and scales for `weight`; each group of `group_size` inputs of a row has its own scale.

    `rtn` gives the weight of largest magnitude the most negative code (1.1 dB better at 4 bits than an equal range on
    both sides); `mse` searches the scale of least squared error (0.5 dB more at 4 bits, ten times the work).
    Raises UsageError for weights that are not finite or beyond fp16 scales.
    """
    check_format(bits, group_size)
    if method not in get_args(Method):
        raise UsageError(f"quantization method {method!r}; it must be one of {', '.join(get_args(Method))}")
    rows = weight.reshape(-1, weight.shape[-1])
    groups = -(-rows.shape[1] // group_size)
    codes = torch.empty(rows.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(rows), groups, dtype=torch.float16, device=weight.device)
    step = max(1, CHUNK_ELEMENTS // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        part = rows[start : start + step].float()
        grouped = F.pad(part, (0, groups * group_size - part.shape[1])).view(len(part), groups, group_size)
        scale = _scales(grouped, bits, method)
        code = _rounded(grouped, scale.float(), bits)
        scales[start : start + step] = (_unshrunk(grouped, code, scale) if method == "mse" else scale).squeeze(-1)
        codes[start : start + step] = code.flatten(1)[:, : part.shape[1]]
    lead = weight.shape[:-1]
    return QuantizedTensor(
        codes=codes.view(weight.shape), scales=scales.view(*lead, groups), bits=bits, group_size=group_size
    )


def _scales(grouped: Tensor, bits: int, method: Method) -> Tensor:
    # Two passes: `aminmax` along the last dimension takes six times as long.
    lowest, highest = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    largest = torch.where(highest > -lowest, highest, lowest)
    base = largest / -(2 ** (bits - 1))
    if not bool((base.abs() <= LARGEST_SCALE).all()):
        bad = int((~(grouped.abs() <= LARGEST_SCALE)).sum())
        raise UsageError(
            f"{bad} weights are not finite or too large for fp16 scales (at most {LARGEST_SCALE:.0f} x "
            f"{2 ** (bits - 1)}); keep this tensor in full precision or rescale it"
        )
    return _as_half(base) if method == "rtn" else _least_squares(grouped, base, bits)


def _least_squares(grouped: Tensor, base: Tensor, bits: int) -> Tensor:
    best, least = _as_half(base), torch.full_like(base, torch.inf)
    for shrink in SHRINKS:
        best, least = _better(grouped, _as_half(base * shrink), best, least, bits)
    for _ in range(REFINEMENTS):
        codes = _rounded(grouped, best.float(), bits)
        fitted = (grouped * codes).sum(-1, keepdim=True) / codes.square_().sum(-1, keepdim=True).clamp(min=1)
        best, least = _better(grouped, _as_half(fitted), best, least, bits)
    return best


def _unshrunk(grouped: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The scale at which code x scale, seen along the weights, is as long as they are.

    Scales of least squared error are shorter by as much as the error takes of the energy (0.8 % at 4 bits): errors of
    one sign, which add up in a product where random ones cancel. Costs 0.04 dB.
    """
    along = (grouped * codes).sum(-1, keepdim=True)
    fair = grouped.square().sum(-1, keepdim=True) / torch.where(along == 0, 1.0, along)
    return torch.where(along == 0, scale, _as_half(fair))


def _better(grouped: Tensor, scale: Tensor, best: Tensor, least: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    wide = scale.float()
    error = _rounded(grouped, wide, bits).mul_(wide).sub_(grouped).square_().sum(-1, keepdim=True)
    improves = error < least
    return torch.where(improves, scale, best), torch.where(improves, error, least)


def _as_half(scale: Tensor) -> Tensor:
    """To fp16; what would vanish becomes the smallest fp16 number, so that only all-zero groups have scale 0."""
    magnitude = scale.abs().clamp(min=SMALLEST_SCALE, max=LARGEST_SCALE)
    return torch.where(scale == 0, 0.0, magnitude.copysign(scale)).half()


def _rounded(grouped: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The codes, still in float32."""
    top = 2 ** (bits - 1)
    return (grouped / torch.where(scale == 0, 1.0, scale)).round_().clamp_(-top, top - 1)


def dequantize_weight(
    weight: QuantizedTensor | PackedTensor, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*E O I"]:
    """Code times scale; exact in float32 and float64."""
    if isinstance(weight, PackedTensor):
        weight = unpack_weight(weight)
    inputs, size = weight.codes.shape[-1], weight.group_size
    codes = weight.codes if inputs % size == 0 else F.pad(weight.codes, (0, -inputs % size))
    scales = weight.scales.to(dtype).unsqueeze(-1)
    return codes.unflatten(-1, (-1, size)).to(dtype).mul_(scales).flatten(-2)[..., :inputs]


def pack_weight(weight: QuantizedTensor) -> PackedTensor:
    """The layout of the kernels; `unpack_weight` gives back the same codes and scales bit for bit."""
    *lead, O, I = weight.codes.shape  # noqa: E741
    groups, size = weight.scales.shape[-1], weight.group_size
    rows = -O % BLOCK_ROWS
    codes = F.pad(weight.codes, (0, groups * size - I, 0, rows))
    scales = F.pad(weight.scales, (0, 0, 0, rows)).unflatten(-2, (-1, BLOCK_ROWS)).transpose(-1, -2)
    blocks = codes.unflatten(-1, (groups, size)).unflatten(-3, (-1, BLOCK_ROWS)).transpose(-2, -3)
    if weight.bits == 8:
        chunks = blocks.unflatten(-1, (-1, 4)).transpose(-2, -3).contiguous().view(torch.uint8)
    else:
        halves = (blocks + 8).view(torch.uint8).unflatten(-1, (-1, 2, 4)).transpose(-3, -4)
        chunks = halves[..., 0, :] | halves[..., 1, :] << 4
    return PackedTensor(
        codes=chunks.reshape(*lead, -1, groups, BLOCK_ROWS * size * weight.bits // 8),
        scales=scales.contiguous(),
        bits=weight.bits,
        group_size=size,
        out_features=O,
        in_features=I,
    )


def unpack_weight(weight: PackedTensor) -> QuantizedTensor:
    """The inverse of `pack_weight`."""
    chunks = weight.codes.unflatten(-1, (-1, BLOCK_ROWS, 4))
    if weight.bits == 8:
        blocks = chunks.view(torch.int8).transpose(-2, -3).flatten(-2)
    else:
        halves = torch.stack([chunks & 15, chunks >> 4], dim=-2).view(torch.int8) - 8
        blocks = halves.transpose(-3, -4).flatten(-3)
    codes = blocks.transpose(-2, -3).flatten(-2).flatten(-3, -2)
    scales = weight.scales.transpose(-1, -2).flatten(-3, -2)
    return QuantizedTensor(
        codes=codes[..., : weight.out_features, : weight.in_features].contiguous(),
        scales=scales[..., : weight.out_features, :].contiguous(),
        bits=weight.bits,
        group_size=weight.group_size,
    )


def quantize_activations(
    x: Float[Tensor, "*N I"], group_size: int
) -> tuple[Int[Tensor, "*N G S"], Float[Tensor, "*N G 1"]]:
    """Codes within 127 and float32 scales of each group of `group_size` inputs, as the kernels compute them.

    The error is at most half a step: maximum of the group / 254. A group with an infinity or NaN has scale NaN.
    """
    grouped = F.pad(x.float(), (0, -x.shape[-1] % group_size)).unflatten(-1, (-1, group_size))
    largest = grouped.abs().amax(-1, keepdim=True)
    empty = largest < EMPTY_BELOW
    codes = (grouped * (127 / largest.masked_fill(empty, 1.0))).round().masked_fill(empty, 0).nan_to_num(0)
    scales = (largest / 127).masked_fill(empty, 0.0).masked_fill(~largest.isfinite(), torch.nan)
    return codes.to(torch.int8), scales


def round_activations(x: Float[Tensor, "*N I"], group_size: int, dtype: torch.dtype) -> Float[Tensor, "*N I"]:
    """`x` as the quantized kernels see it: code times scale, in `dtype`."""
    codes, scales = quantize_activations(x, group_size)
    return (codes.to(dtype) * scales.to(dtype)).flatten(-2)[..., : x.shape[-1]]


def reference_linear(
    x: Float[Tensor, "*N I"], weight: QuantizedTensor | PackedTensor, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*N O"]:
    """What `native.quantized_linear` computes, in `dtype` throughout: float64 is the reference of its tests."""
    return round_activations(x, weight.group_size, dtype) @ dequantize_weight(weight, dtype).mT


def reference_mixture(
    x: Float[Tensor, "N D"],
    gate_up: PackedTensor,
    down: PackedTensor,
    weights: Float[Tensor, "N K"],
    experts: Int[Tensor, "N K"],
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "N D"]:
    """What `native.quantized_moe` computes, in `dtype` throughout; gate_up is packed as [E, 2, F, D]."""
    out = torch.zeros(len(x), down.out_features, dtype=dtype, device=x.device)
    for expert in experts.unique().tolist():
        if not 0 <= expert < len(down.codes):
            raise UsageError(f"expert id {expert} is outside 0..{len(down.codes) - 1}, the experts of these weights")
        token, choice = (experts == expert).nonzero(as_tuple=True)
        gate, up = (reference_linear(x[token], matrix_of(gate_up, expert, half), dtype) for half in (0, 1))
        output = reference_linear(F.silu(gate) * up, matrix_of(down, expert), dtype)
        out.index_add_(0, token, output * weights[token, choice, None].to(dtype))
    return out


def matrix_of(weight: PackedTensor, *index: int) -> PackedTensor:
    """One matrix of a stack, without a copy."""
    return PackedTensor(
        codes=weight.codes[index],
        scales=weight.scales[index],
        bits=weight.bits,
        group_size=weight.group_size,
        out_features=weight.out_features,
        in_features=weight.in_features,
    )
