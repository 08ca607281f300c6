"""Weights that GPTQ packed into 4 or 8 bits, unpacked when read; the codes stay accessible.

Per linear of I inputs and O outputs (spec 3.5): `qweight` int32 [I * bits / 32, O], inputs packed low bits first;
`qzeros` int32 [groups, O * bits / 32], packed along the outputs, zero minus one; `scales` fp16 [groups, O];
`g_idx` int32 [I], the group of each input. Files of version 2 (`checkpoint_format` gptq_v2) store the zero itself, and
some tools write such zeros under a header that names version 1: in symmetric files, whose zeros are the middle code,
the zeros themselves tell. weight[o, i] = scales[g, o] * (code - zero), rounded once to fp16.
Not here: quantizing (`quantize.py`), and running in few bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from yuanmoe.checkpoint.files.lazy import LazyTensor
from yuanmoe.errors import CheckpointError

_ROWS = 2048
"""Rows unpacked at a time: enough to keep the cores busy, few enough that what is in between stays small."""

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTQTensor(LazyTensor):
    """The weight [O, I] of one packed linear; reading some rows unpacks those rows."""

    name: str
    bits: int
    zeros_as_they_are: bool | None
    """True under version 2; None where the zeros have to tell: they are symmetric, under a header of version 1."""
    qweight: LazyTensor
    qzeros: LazyTensor
    scales: LazyTensor
    g_idx: LazyTensor

    def flat(self, start: int, stop: int) -> Tensor:
        inputs = self.shape[1]
        first, last = start // inputs, -(-stop // inputs)
        qweight, scales = self.qweight.read(), self.scales.read().T
        # Stored minus one in version 1; a zero of 0 went round to the largest code, and comes back round.
        stored = self.qzeros.read()
        offset = 0 if self._is_version_2(stored) else 1
        zeros = (unpack_gptq(stored.T, self.bits).T + offset) & (2**self.bits - 1)
        groups = self._groups()
        rows = torch.empty(last - first, inputs, dtype=self.dtype)
        for block, low in zip(rows.split(_ROWS), range(first, last, _ROWS), strict=True):
            some = slice(low, low + len(block))
            block.copy_(_dequantized(unpack_gptq(qweight[:, some], self.bits), zeros[some], scales[some], groups))
        return rows.view(-1)[start - first * inputs : stop - first * inputs]

    def symmetric_group_size(self) -> int | None:
        """Inputs of a group, where groups are equal runs and every zero is the middle code; else None."""
        # Stored minus one in version 1, so two nibbles of 7 or a byte of 127.
        stored = self.qzeros.read()
        octet = (
            _middle(self.bits) if self._is_version_2(stored) else _middle(self.bits) - (0x11 if self.bits == 4 else 1)
        )
        symmetric = bool((stored.contiguous().view(torch.uint8) == octet).all())
        plain = symmetric and self.bits in (4, 8) and self._groups() is None
        return self.shape[1] // self.scales.shape[0] if plain else None

    def signed(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """The codes int8 [rows, I] and scales [rows, groups] of some rows, where there is a symmetric group size."""
        codes = unpack_gptq(self.qweight.read()[:, first:last], self.bits)
        return (codes.int() - 2 ** (self.bits - 1)).to(torch.int8), self.scales.read().T[first:last].contiguous()

    def _is_version_2(self, stored: Tensor) -> bool:
        if self.zeros_as_they_are is not None:
            return self.zeros_as_they_are
        return bool((stored.contiguous().view(torch.uint8) == _middle(self.bits)).all())

    def _groups(self) -> Tensor | None:
        """The group of each input; None where groups are equal runs of inputs, as in every released file."""
        groups, count = self.g_idx.read().long(), self.scales.shape[0]
        if bool(((groups < 0) | (groups >= count)).any()):
            raise CheckpointError(f"{self.name}.g_idx names groups outside 0..{count - 1}; the file is damaged")
        inputs = len(groups)
        runs = torch.arange(inputs) // max(1, inputs // count)
        return None if inputs % count == 0 and torch.equal(groups, runs) else groups


def _middle(bits: int) -> int:
    """A byte of middle codes."""
    return {2: 0b10101010, 4: 0x88, 8: 0x80}[bits]


def _dequantized(codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor | None) -> Tensor:
    """Weights [O, I] out of codes [O, I] and the zeros and scales [O, groups]."""
    if groups is not None:
        zeros, scales = zeros[:, groups], scales[:, groups]
    # Differences of codes are exact in 16 bits, so each weight is rounded once.
    runs = codes.view(*zeros.shape, -1).to(scales.dtype)
    return ((runs - zeros.unsqueeze(2)) * scales.unsqueeze(2)).view(codes.shape)


def unpack_gptq(words: Tensor, bits: int) -> Tensor:
    """Codes uint8 [N, W * 32 / bits] out of int32 `words` [W, N], low bits first."""
    # Flattened first: a transposed single column counts as contiguous, but cannot be viewed as bytes.
    octets = words.reshape(-1).view(torch.uint8).view(*words.shape, 4)
    codes = torch.stack([(octets >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], dim=-1)
    return codes.flatten(2).transpose(0, 1).flatten(1)


def packed_tensors(tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> dict[str, LazyTensor]:
    """`tensors` with every packed linear `X` as one `X.weight`.

    `settings` are those of quantize_config.json. Raises CheckpointError for another method or packing, and for parts
    that are missing or do not fit each other.
    """
    method, bits = settings.get("quant_method", "gptq"), settings.get("bits")
    form = settings.get("checkpoint_format", "gptq")
    if method != "gptq" or form not in ("gptq", "gptq_v2") or bits not in (2, 4, 8):
        raise CheckpointError(
            f"weights packed by {method!r} ({form!r}) in {bits!r} bits; supported: 'gptq' in 2, 4 or 8 bits"
        )
    as_they_are = None if form == "gptq" and settings.get("sym") is True else form == "gptq_v2"
    packed = {name.rpartition(".")[0] for name in tensors if name.endswith(".qweight")}
    parts = {f"{name}.{suffix}" for name in packed for suffix in SUFFIXES}
    plain = {name: tensor for name, tensor in tensors.items() if name not in parts}
    return plain | {f"{name}.weight": _packed(name, tensors, bits, as_they_are) for name in sorted(packed)}


def _packed(name: str, tensors: Mapping[str, LazyTensor], bits: int, as_they_are: bool | None) -> GPTQTensor:
    missing = [f"{name}.{suffix}" for suffix in SUFFIXES if f"{name}.{suffix}" not in tensors]
    if missing:
        raise CheckpointError(f"tensor {missing[0]!r} of a packed weight is missing; download the files again")
    qweight, qzeros, scales, g_idx = (tensors[f"{name}.{suffix}"] for suffix in SUFFIXES)
    (words, outputs), (groups, _) = _matrix(qweight), _matrix(scales)
    inputs = words * 32 // bits
    expected = ((words, outputs), (groups, outputs * bits // 32), (groups, outputs), (inputs,))
    found = (qweight.shape, qzeros.shape, scales.shape, g_idx.shape)
    integers = {qweight.dtype, qzeros.dtype} == {torch.int32} and scales.dtype.is_floating_point
    if found != expected or not integers:
        raise CheckpointError(
            f"{', '.join(SUFFIXES)} of {name} have shapes {found} and dtypes {qweight.dtype}, {qzeros.dtype}, "
            f"{scales.dtype}; expected {expected} and int32, int32, float16"
        )
    return GPTQTensor(
        shape=(outputs, inputs),
        dtype=scales.dtype,
        name=name,
        bits=bits,
        zeros_as_they_are=as_they_are,
        qweight=qweight,
        qzeros=qzeros,
        scales=scales,
        g_idx=g_idx,
    )


def _matrix(tensor: LazyTensor) -> tuple[int, int]:
    return (tensor.shape[0], tensor.shape[1]) if len(tensor.shape) == 2 else (0, 0)
