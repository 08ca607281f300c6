"""One weight on its way from a checkpoint to packed codes and scales, some rows at a time.

Three sources of codes: rounding (`ops.quantize.groupwise`), official GPTQ codes kept as they are, and rounding that
makes up for its errors on a calibration text (`ops.quantize.compensate`). Not here: which weights, and where they go
(`quantize_weight.py`).
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from yuanmoe.checkpoint.files.lazy import ComposedTensor, LazyTensor
from yuanmoe.checkpoint.formats import gptq
from yuanmoe.errors import UsageError
from yuanmoe.ops.quantize.groupwise import (
    BLOCK_ROWS,
    Method,
    PackedTensor,
    QuantizedTensor,
    dequantize_weight,
    pack_weight,
    quantize_weight,
)
from yuanmoe.ops.quantize.packed_format import PackedFormat

PIECE_ELEMENTS = 1 << 18
"""Weights that a thread encodes before it takes the next: some milliseconds, and 1 MiB in float32."""

S = TypeVar("S")
T = TypeVar("T")


class Noise(NamedTuple):
    """Energy of a matrix, and of what quantizing added to it."""

    signal: float
    noise: float

    def __add__(self, other: object) -> "Noise":
        assert isinstance(other, Noise)
        return Noise(self.signal + other.signal, self.noise + other.noise)


class WeightEncoder(ABC):
    """How the rows of one weight become codes."""

    alone = False
    """Whether pieces are encoded one after the other, each on all cores, because several would not fit into memory."""

    def __init__(self, tensor: LazyTensor, form: PackedFormat) -> None:
        self.tensor = tensor
        self.form = form

    @property
    def rows_at_once(self) -> int:
        """Rows of a matrix that are encoded together."""
        return max(BLOCK_ROWS, PIECE_ELEMENTS // self.form.columns // BLOCK_ROWS * BLOCK_ROWS)

    def weight(self, matrix: int, first: int, last: int) -> Tensor:
        """Rows [first, last) of a matrix as they are in the checkpoint, in float32."""
        start, columns = matrix * self.form.rows, self.form.columns
        flat = self.tensor.flat((start + first) * columns, (start + last) * columns)
        return flat.view(last - first, columns).float()

    @abstractmethod
    def encode(self, matrix: int, first: int, last: int) -> tuple[QuantizedTensor, Noise]:
        """Rows [first, last) of a matrix; called by several threads."""

    def facts(self) -> dict[str, Any]:
        """What is worth remembering besides the noise, as JSON values, once the whole weight is encoded."""
        return {}


class Rounded(WeightEncoder):
    """To the nearest code, with scales by `method`."""

    def __init__(self, tensor: LazyTensor, form: PackedFormat, method: Method) -> None:
        super().__init__(tensor, form)
        self.method: Method = method

    def encode(self, matrix: int, first: int, last: int) -> tuple[QuantizedTensor, Noise]:
        weight = self.weight(matrix, first, last)
        found = quantize_weight(weight, self.form.bits, self.form.group_size, self.method)
        return found, measure_noise(weight, found)


class Kept(WeightEncoder):
    """The codes of official GPTQ files: no bit is lost."""

    def encode(self, matrix: int, first: int, last: int) -> tuple[QuantizedTensor, Noise]:
        start, columns = matrix * self.form.rows, self.form.columns
        parts = []
        for part, low, high in _overlaps(self.tensor, (start + first) * columns, (start + last) * columns):
            assert isinstance(part, gptq.GPTQTensor), "`keeps` was asked first"
            parts.append(part.signed(low // columns, high // columns))
        codes, scales = (torch.cat(same) for same in zip(*parts, strict=True))
        if not scales.isfinite().all():
            raise UsageError(f"{int((~scales.isfinite()).sum())} scales of the GPTQ file are infinite or no numbers")
        found = QuantizedTensor(codes=codes, scales=scales, bits=self.form.bits, group_size=self.form.group_size)
        return found, Noise(_energy(dequantize_weight(found)), 0.0)

    def facts(self) -> dict[str, Any]:
        return {"kept": True}


def keeps(tensor: LazyTensor, form: PackedFormat) -> bool:
    """Whether a weight is in codes already, of the same bits and groups and around zero, in whole rows."""
    parts = [part for part, _, _ in _overlaps(tensor, 0, tensor.numel)]
    return all(
        isinstance(part, gptq.GPTQTensor)
        and part.bits == form.bits
        and part.symmetric_group_size() == form.group_size
        and part.scales.dtype == torch.float16
        for part in parts
    )


def _overlaps(tensor: LazyTensor, start: int, stop: int) -> Iterator[tuple[LazyTensor, int, int]]:
    """The parts that elements [start, stop) of a tensor come from, with their own ranges."""
    if not isinstance(tensor, ComposedTensor):
        yield tensor, start, stop
        return
    base = 0
    for part, first, last in tensor.parts:
        low, high = max(start - base, 0), min(stop - base, last - first)
        if low < high:
            yield part, first + low, first + high
        base += last - first


def measure_noise(weight: Tensor, found: QuantizedTensor) -> Noise:
    """What `found` lost of `weight`."""
    return Noise(_energy(weight), _energy(dequantize_weight(found).sub_(weight)))


def _energy(values: Tensor) -> float:
    """The sum of squares: of each row in float32, of all rows in float64."""
    return torch.linalg.vector_norm(values, dim=-1).double().square_().sum().item()


class EncodedWeight:
    """The codes and scales of a weight, computed while they are written, and what was lost on the way."""

    def __init__(self, name: str, encoder: WeightEncoder, pool: Executor, ahead: int) -> None:
        """`pool` encodes up to `ahead` pieces before they are written."""
        self._name, self._encoder, self._pool, self._ahead = name, encoder, pool, ahead
        self._scales: list[Tensor] = []
        self._noise: list[Noise] = []

    def lazy(self) -> tuple[LazyTensor, LazyTensor]:
        """Codes and scales, to be written in this order."""
        form = self._encoder.form
        codes = Computed(shape=form.codes_shape, dtype=torch.uint8, compute=self._compute_codes)
        return codes, Computed(shape=form.scales_shape, dtype=torch.float16, compute=self._take_scales)

    def facts(self) -> dict[str, Any]:
        """What was lost of each matrix, and what the encoder knows; once all codes were computed."""
        return {"noise": [[float(f"{x:.7g}") for x in noise] for noise in self._noise]} | self._encoder.facts()

    def _compute_codes(self) -> Iterator[Tensor]:
        form, step = self._encoder.form, self._encoder.rows_at_once
        pieces = [
            (matrix, first, min(first + step, form.rows))
            for matrix in range(form.matrices)
            for first in range(0, form.rows, step)
        ]
        self._scales, self._noise = [], [Noise(0.0, 0.0)] * form.matrices
        encoded = in_order(self._pool, self._encode, pieces, self._ahead)
        if self._encoder.alone:
            encoded = map(self._encode, pieces)
        for (matrix, *_), (packed, noise) in zip(pieces, encoded, strict=True):
            self._scales.append(packed.scales.flatten())
            self._noise[matrix] += noise
            yield packed.codes.flatten()

    def _encode(self, piece: tuple[int, int, int]) -> tuple[PackedTensor, Noise]:
        try:
            found, noise = self._encoder.encode(*piece)
        except UsageError as error:
            raise UsageError(f"{self._name}: {error}") from error
        return pack_weight(found), noise

    def _take_scales(self) -> Iterator[Tensor]:
        if not self._scales:  # The codes are in an earlier shard, of an earlier run.
            for _ in self._compute_codes():
                pass
        found, self._scales = self._scales, []
        yield from found


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed(LazyTensor):
    """A tensor that comes in blocks, one after the other, and only as a whole."""

    compute: Callable[[], Iterator[Tensor]]

    def blocks(self, max_bytes: int = 0) -> Iterator[Tensor]:  # noqa: ARG002
        return self.compute()

    def flat(self, start: int, stop: int) -> Tensor:
        return torch.cat(list(self.compute()))[start:stop]


def in_order(pool: Executor, call: Callable[[S], T], values: Iterable[S], ahead: int) -> Iterator[T]:
    """`call` of each value, at most `ahead` of them running or waiting to be taken."""
    rest = iter(values)
    running = deque(pool.submit(call, value) for value in islice(rest, ahead))
    try:
        while running:
            result = running.popleft().result()
            running.extend(pool.submit(call, value) for value in islice(rest, 1))
            yield result
    finally:
        for future in running:
            future.cancel()
