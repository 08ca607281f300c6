"""Factors added to the weights that they correct, on the way from one checkpoint to another; nothing is ever held.

Legend: O outputs, I inputs, R rank, M matrices of a stack.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from yuanmoe.checkpoint.adapters.adapter import Adapter, adapted_shapes, check_source, open_adapter
from yuanmoe.checkpoint.files.lazy import LazyTensor, main_dtype
from yuanmoe.checkpoint.formats.mapping import EMBEDDING, HEAD, layout
from yuanmoe.checkpoint.formats.native_config import native_config
from yuanmoe.checkpoint.open import OpenCheckpoint, open_checkpoint
from yuanmoe.checkpoint.write.save import contents_of
from yuanmoe.checkpoint.write.writer import WriteOptions, Written, write_checkpoint
from yuanmoe.errors import UsageError
from yuanmoe.model.lora.attach import A, B
from yuanmoe.storage.folder import check_apart


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedTensor(LazyTensor):
    """A weight [*M, O, I] with scale B A added in float32, rounded once."""

    tensor: LazyTensor
    a: Tensor
    b: Tensor
    scale: float

    def flat(self, start: int, stop: int) -> Tensor:
        O, I = self.shape[-2:]  # noqa: E741
        first, last = start // I, stop // I
        rows = self.tensor.flat(start, stop).to(torch.float32, copy=True).view(-1, I)
        a, b = self.a.float().view(-1, self.a.shape[-2], I), self.b.float().flatten(0, -2)
        for matrix in range(first // O, -(-last // O)):
            low, high = max(first, matrix * O), min(last, (matrix + 1) * O)
            rows[low - first : high - first].addmm_(b[low:high], a[matrix], alpha=self.scale)
        return rows.flatten().to(self.dtype)


def merge_adapter(base: Path | str, adapter: Path | str, dst: Path | str, **options: Unpack[WriteOptions]) -> Written:
    """Writes the base with an adapter in its weights as a native checkpoint; interrupted, it goes on when run again.

    Raises UsageError for a base in few bits, whose rounding would swallow what was learned, and what opening and
    writing raise.
    """
    check_apart(base, dst)
    source, opened = open_checkpoint(base), open_adapter(adapter)
    if source.precision is not None:
        raise UsageError(
            f"{base} holds weights in few bits, which cannot take an adapter in; merge it into the checkpoint that "
            "they were made of and quantize the result (yuanmoe quantize), or keep it beside them: --adapter"
        )
    check_source(opened, source)
    tensors = merged_tensors(source, opened)
    # A head that was the embedding is one of its own once it is adapted.
    config = source.config.replace(tie_word_embeddings=source.config.tie_word_embeddings and HEAD not in tensors)
    tensors = {name: tensors[name] for name in layout(config).native}
    contents = contents_of(source, tensors, native_config(config, main_dtype(tensors), source.origin))
    key = hashlib.sha256((contents.fingerprint + _digest(opened)).encode()).hexdigest()
    return write_checkpoint(dst, replace(contents, fingerprint=key), **options)


def merged_tensors(source: OpenCheckpoint, adapter: Adapter) -> dict[str, LazyTensor]:
    """All weights of a checkpoint, lazily, the adapted ones with their correction."""
    tensors = dict(source.tensors)
    for name in adapted_shapes(adapter):
        whole = tensors.get(name, tensors[EMBEDDING])
        a, b = adapter.tensors[f"{name}.{A}"], adapter.tensors[f"{name}.{B}"]
        tensors[name] = MergedTensor(
            shape=whole.shape, dtype=whole.dtype, tensor=whole, a=a, b=b, scale=adapter.settings.scale
        )
    return tensors


def _digest(adapter: Adapter) -> str:
    """Of all factors."""
    digest = hashlib.sha256()
    for name, tensor in adapter.tensors.items():
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
