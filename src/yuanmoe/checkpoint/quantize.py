"""Write a checkpoint of any format in 4 or 8 bits, in the layout of the kernels, without ever holding it.

Weights stream through as they are written: some rows at a time, on all cores, so that memory stays bounded whatever
their sizes; the first shard that is not finished is where an interrupted run goes on.
Not here: the policy and the layout (`packed_weight.py`), rounding (`encoding.py`, `calibration.py`), writing
(`writer.py`), how much worse a model got (`studies/quality.py`).
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

import torch

from yuanmoe.checkpoint import gptq
from yuanmoe.checkpoint.calibration import Calibrated, Calibration
from yuanmoe.checkpoint.encoding import EncodedWeight, Encoder, Kept, Noise, Rounded, keeps
from yuanmoe.checkpoint.folder import check_apart
from yuanmoe.checkpoint.lazy import LazyTensor, main_dtype
from yuanmoe.checkpoint.mapping import layout
from yuanmoe.checkpoint.native_config import native_config
from yuanmoe.checkpoint.packed_weight import packed_formats, policy, quantization_record
from yuanmoe.checkpoint.save import contents_of
from yuanmoe.checkpoint.store import Source, open_checkpoint
from yuanmoe.checkpoint.writer import WriteOptions, Written, write_checkpoint
from yuanmoe.errors import UsageError
from yuanmoe.ops.packing import PackedFormat
from yuanmoe.plan.cost import Precision

Method = Literal["rtn", "mse", "gptq"]
"""Round to nearest, scales of least squared error, or errors made up for on a calibration text."""

SHARD_BYTES = 1_000_000_000
"""A layer of M32 in 4 bits: what an interruption costs at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """What was written, and what it lost: `noise` by weight, one for each matrix of a stack."""

    written: Written
    precision: Precision
    method: Method
    noise: dict[str, list[Noise]]
    source_bytes: int
    notes: tuple[str, ...]
    """What a user should know of this source: padding, codes kept or not."""


def quantize(
    src: Path | str,
    dst: Path | str,
    *,
    bits: int,
    group_size: int | None = None,
    roles: Mapping[str, int] | None = None,
    method: Method = "mse",
    calibration: Sequence[int] = (),
    ignore_unknown: bool = False,
    **options: Unpack[WriteOptions],
) -> Quantized:
    """Write the checkpoint in `src` to `dst` in `bits`; run again after an interruption, it goes on where it was.

    `group_size` is 64, or that of a GPTQ source, unless given; `roles` have other bits than the default policy;
    `calibration` are the tokens of a text for `gptq`. Uses as many threads as torch. Raises UsageError for what does
    not go together, and what `open_checkpoint` and `writer.write_checkpoint` raise.
    """
    _check_method(method, calibration)
    check_apart(src, dst)
    source = open_checkpoint(src, ignore_unknown=ignore_unknown)
    if source.precision is not None:
        raise UsageError(f"{src} is quantized already; quantize the checkpoint that it was made from")
    precision = policy(source.config, bits, group_size=group_size or _group_size(source), roles=roles)
    formats = packed_formats(source.config, precision)
    record = quantization_record(source.config, precision, method)
    if calibration:
        digest = hashlib.sha256(json.dumps(list(calibration)).encode()).hexdigest()
        record["calibration"] = {"tokens": len(calibration), "sha256": digest}
    described = native_config(source.config, main_dtype(source.tensors), source.origin) | {"quantization": record}
    context = Calibration(source, calibration) if method == "gptq" else None
    with _workers() as pool:
        encoders = {name: _encoder(source, name, form, method, context) for name, form in formats.items()}
        ahead = 2 * torch.get_num_threads()
        weights = {name: EncodedWeight(encoder, pool, ahead) for name, encoder in encoders.items()}
        options.setdefault("shard_bytes", SHARD_BYTES)
        contents = contents_of(source, _tensors(source, weights), described, facts=lambda names: _facts(weights, names))
        written = write_checkpoint(dst, contents, **options)
    return Quantized(
        written=written,
        precision=precision,
        method=method,
        noise={name: [Noise(*pair) for pair in pairs] for name, pairs in written.facts.items()},
        source_bytes=sum(tensor.nbytes for tensor in source.tensors.values()),
        notes=tuple(_notes(source, formats, encoders, context)),
    )


def _check_method(method: Method, calibration: Sequence[int]) -> None:
    if method not in get_args(Method):
        raise UsageError(f"method {method!r}; known: {', '.join(get_args(Method))}")
    if method == "gptq" and len(calibration) < 2:
        raise UsageError(
            "gptq rounds by a text: give it one, --calibration FILE, or take --method mse, which needs none"
        )
    if method != "gptq" and calibration:
        raise UsageError(f"{method} uses no calibration text; leave it out, or take --method gptq")


def _group_size(source: Source) -> int:
    """What fits the codes of a GPTQ source, so that they can be kept; else 64."""
    sizes = (t.symmetric_group_size() for t in source.stored.values() if isinstance(t, gptq.PackedTensor))
    return next((size for size in sizes if size in (32, 64, 128)), 64)


@contextmanager
def _workers() -> Iterator[Executor]:
    """As many threads as torch uses, each with one of its own; torch keeps its number everywhere else."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        with pool:
            yield pool
    finally:
        torch.set_num_threads(threads)  # Workers set what threads that are yet to come start with.


def _encoder(source: Source, name: str, form: PackedFormat, method: Method, context: Calibration | None) -> Encoder:
    tensor = source.tensors[name]
    if source.format == "gptq" and keeps(tensor, form):
        return Kept(tensor, form)
    if context is not None and context.covers(name):
        return Calibrated(tensor, form, context, name)
    return Rounded(tensor, form, "rtn" if method == "rtn" else "mse")


def _tensors(source: Source, weights: Mapping[str, EncodedWeight]) -> dict[str, LazyTensor]:
    """Everything to write, in the order of the model."""
    tensors = {}
    for name in layout(source.config).native:
        if name in weights:
            tensors[f"{name}.codes"], tensors[f"{name}.scales"] = weights[name].lazy()
        else:
            tensors[name] = source.tensors[name]
    return tensors


def _facts(weights: Mapping[str, EncodedWeight], names: Iterable[str]) -> dict[str, Any]:
    """The noise of the weights whose scales, the last of them to be written, are among `names`."""
    ready = (name.removesuffix(".scales") for name in names if name.endswith(".scales"))
    return {name: [[float(f"{x:.7g}") for x in noise] for noise in weights[name].noise] for name in ready}


def _notes(
    source: Source,
    formats: Mapping[str, PackedFormat],
    encoders: Mapping[str, Encoder],
    calibration: Calibration | None,
) -> Iterator[str]:
    exact = sum(form.matrices * form.rows * form.columns * form.bits // 8 for form in formats.values())
    padded = sum(math.prod(form.codes_shape) for form in formats.values())
    if padded > 1.01 * exact:
        yield (
            f"codes take {padded / exact - 1:.0%} more than their bits: rows are padded to 16 and inputs to whole "
            "groups; smaller groups may pad less"
        )
    if source.format == "gptq":
        kept = sum(isinstance(encoder, Kept) for encoder in encoders.values())
        yield (
            f"{kept} of {len(encoders)} quantized weights keep the codes of the GPTQ files bit for bit; the others "
            "have none there, or of other bits, groups or zeros. What stays whole is as precise as in those files"
        )
    wide = [name for name in formats if calibration and ".layers." in name and not calibration.covers(name)]
    if wide:
        yield f"{len(wide)} weights have too many inputs for GPTQ and were rounded as by mse, {wide[0]} among them"
    if calibration and calibration.scarce:
        experts = len(calibration.scarce)
        (name, expert), tokens = min(calibration.scarce.items(), key=itemgetter(1))
        yield (
            f"{experts} experts' weights met few tokens of the calibration text and are hardly better than by mse "
            f"({name} of expert {expert}: {tokens}); a longer text reaches more"
        )
