"""Quantized weights in our own layout: which ones there are, what config.json says of them, and how they are read.

A quantized weight `X` is stored as `X.codes` and `X.scales` in the layout of the kernels
(`ops/quantize/packed_format.py`), so loading is mapping. config.json names what is in few bits by role; everything
else is stored as it is:

{"quantization": {"layout": 1, "method": "mse", "group_size": 64, "roles": {"experts": 4, "attention": 4, "lfa": 8}}}

Not here: making them (`quantize.py`), computing with them (`model/quantized/build.py`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from yuanmoe.checkpoint.files.lazy import LazyTensor
from yuanmoe.checkpoint.formats.mapping import EMBEDDING, HEAD, layout
from yuanmoe.config import ModelConfig
from yuanmoe.errors import CheckpointError, UsageError
from yuanmoe.ops.quantize.groupwise import BITS, BLOCK_ROWS, GROUP_SIZES, PackedTensor, check_format, dequantize_weight
from yuanmoe.ops.quantize.packed_format import PackedFormat
from yuanmoe.plan.cost import PRECISIONS, ROLES, Precision, Role

LAYOUT = 1
"""Version of the packed layout. A newer one is refused, never misread."""

WHOLE = 16
"""What a policy calls weights that stay as they are, whatever their dtype."""

# In this order: an LFA norm is a norm, and what is left of an MLP is a dense one.
_MARKS: tuple[tuple[str, Role], ...] = (
    ("norm.weight", "norms"),
    (".mlp.router.", "router"),
    (".mlp.shared_experts.", "shared_experts"),
    (".mlp.experts.", "experts"),
    (".mlp.", "dense"),
    (".lfa.", "lfa"),
    (".self_attn.", "attention"),
    (EMBEDDING, "embedding"),
    (HEAD, "head"),
)


def role_of(name: str) -> Role:
    """The role of one of our tensors, as `plan.cost` counts it."""
    return next(role for mark, role in _MARKS if mark in name)


def policy(
    config: ModelConfig, bits: int, *, group_size: int = 64, roles: Mapping[str, int] | None = None
) -> Precision:
    """The precision of every role: the defaults for `bits`, and `roles` that differ (4, 8, or 16 for as it is).

    Raises UsageError for what no kernel knows and for roles that this model does not have.
    """
    check_format(bits, group_size)
    roles = dict(roles or {})
    present = {role_of(name) for name, shape in layout(config).native.items() if len(shape) > 1}
    for role, value in roles.items():
        if role in ("router", "norms"):
            raise UsageError(f"{role} stays as it is: routers decide by small differences, and norms are few numbers")
        if role not in present:
            hint = "; its head is the embedding" if role == "head" and role in ROLES else ""
            raise UsageError(f"{role!r} is no role of this model's matrices{hint}; roles: {', '.join(sorted(present))}")
        if value not in (*BITS, WHOLE):
            raise UsageError(f"{role}={value}: it can have 4 or 8 bits, or 16 to stay as it is")
    changed: dict[Role, int] = {**PRECISIONS[bits].role_bits, **{role: roles[role] for role in ROLES if role in roles}}
    if config.tie_word_embeddings:
        changed["head"] = changed.get("embedding", bits)
    return replace(PRECISIONS[bits], role_bits=changed, group_size=group_size)


def packed_formats(config: ModelConfig, precision: Precision) -> dict[str, PackedFormat]:
    """The format of every quantized weight of a model by name; gate and up are matrices of their own."""
    found = {}
    for name, shape in layout(config).native.items():
        bits = precision.role_bits.get(role_of(name), precision.bits)
        if bits == WHOLE or len(shape) == 1:
            continue
        *lead, rows, columns = shape
        if name.endswith(".experts.gate_up_proj"):
            lead, rows = [*lead, 2], rows // 2
        found[name] = PackedFormat(
            lead=tuple(lead), rows=rows, columns=columns, bits=bits, group_size=precision.group_size
        )
    return found


def quantization_record(config: ModelConfig, precision: Precision, method: str) -> dict[str, Any]:
    """What config.json says of the quantized weights."""
    roles = {role_of(name): form.bits for name, form in packed_formats(config, precision).items()}
    return {"layout": LAYOUT, "method": method, "group_size": precision.group_size, "roles": roles}


def read_record(path: Path, record: Any) -> Precision:
    """The inverse of `quantization_record`.

    Raises CheckpointError for another version of the layout and for what is no record.
    """
    fields: dict[str, Any] = record if isinstance(record, dict) else {}
    version, roles, group_size = fields.get("layout"), fields.get("roles", ()), fields.get("group_size", 0)
    if type(version) is int and version != LAYOUT:
        way = "update it" if version > LAYOUT else "quantize the weights again"
        raise CheckpointError(
            f"{path} has version {version} of the layout of quantized weights, this package reads {LAYOUT}; {way}"
        )
    known = isinstance(roles, dict) and all(role in ROLES and bits in BITS for role, bits in roles.items())
    if version != LAYOUT or group_size not in GROUP_SIZES or not known:
        raise CheckpointError(f"{path} describes its quantization as {record!r:.200}; it is damaged")
    return Precision(bits=WHOLE, role_bits=roles, group_size=group_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight(LazyTensor):
    """A weight stored as codes and scales; read as a tensor it is dequantized, some rows at a time."""

    format: PackedFormat
    codes: LazyTensor
    scales: LazyTensor

    def packed(self, device: torch.device | str = "cpu") -> PackedTensor:
        """Codes and scales as they are: mapped memory on the CPU, a copy elsewhere."""
        return self.format.tensor(self.codes.read(device), self.scales.read(device))

    def flat(self, start: int, stop: int) -> Tensor:
        columns, rows = self.format.columns, self.format.rows
        first, last = start // columns, -(-stop // columns)
        parts = []
        for matrix in range(first // rows, -(-last // rows)):
            base = matrix * rows
            parts.append(self._rows(matrix, max(first - base, 0), min(last - base, rows)))
        flat = torch.cat(parts).flatten().to(self.dtype)
        return flat[start - first * columns : stop - first * columns]

    def _rows(self, matrix: int, first: int, last: int) -> Tensor:
        """Rows [first, last) of one matrix in float32; reads whole blocks."""
        form = self.format
        low, high = first // BLOCK_ROWS, -(-last // BLOCK_ROWS)
        cut = replace(form, lead=(), rows=min(form.rows, high * BLOCK_ROWS) - low * BLOCK_ROWS)
        base = matrix * -(-form.rows // BLOCK_ROWS)
        codes, scales = (
            tensor.flat((base + low) * size, (base + high) * size)
            for tensor, size in (
                (self.codes, form.groups * form.codes_shape[-1]),
                (self.scales, form.groups * form.scales_shape[-1]),
            )
        )
        whole = dequantize_weight(cut.tensor(codes, scales))
        return whole[first - low * BLOCK_ROWS : last - low * BLOCK_ROWS]


def packed_weights(
    place: object, formats: Mapping[str, PackedFormat], stored: Mapping[str, LazyTensor], dtype: torch.dtype
) -> dict[str, LazyTensor]:
    """`stored` with every quantized weight in the place of its codes and scales; as tensors they have `dtype`.

    Raises CheckpointError where one is missing or has another shape than its format.
    """
    found = {name: tensor for name, tensor in stored.items() if name not in _part_names(formats)}
    for name, form in formats.items():
        codes, scales = (
            _part(place, stored, f"{name}.codes", form.codes_shape, torch.uint8),
            _part(place, stored, f"{name}.scales", form.scales_shape, torch.float16),
        )
        shape = (form.rows, form.columns)
        if form.lead:
            shape = (form.lead[0], form.matrices // form.lead[0] * form.rows, form.columns)
        found[name] = PackedWeight(shape=shape, dtype=dtype, format=form, codes=codes, scales=scales)
    return found


def _part_names(names: Iterable[str]) -> set[str]:
    return {f"{name}.{part}" for name in names for part in ("codes", "scales")}


def _part(
    place: object, stored: Mapping[str, LazyTensor], name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> LazyTensor:
    if name not in stored:
        raise CheckpointError(
            f"{place}: tensor {name!r} is missing; the files are incomplete, or config.json belongs to another model"
        )
    found = stored[name]
    if (found.shape, found.dtype) != (shape, dtype):
        raise CheckpointError(
            f"{place}: tensor {name!r} is {found.dtype} {list(found.shape)}; its format needs {dtype} {list(shape)}"
        )
    return found
