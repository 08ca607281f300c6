"""Write a checkpoint of any format in 4 or 8 bits, in the layout of the kernels, without ever holding it.

`prepare` says what would be written before anything is spent. Weights then stream through as they are written: some
rows at a time, on all cores, so that memory stays bounded whatever their sizes; the first shard that is not finished is
where an interrupted run goes on.
Not here: the policy and the layout (`packed_weight.py`), rounding (`encoding.py`, `calibration.py`), writing
(`writer.py`), what was lost (`report.py`, `evals/quality.py`).
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

import torch

from yuanmoe.checkpoint.files.lazy import LazyTensor, main_dtype
from yuanmoe.checkpoint.formats import gptq
from yuanmoe.checkpoint.formats.mapping import layout
from yuanmoe.checkpoint.formats.native_config import native_config
from yuanmoe.checkpoint.formats.packed_weight import packed_formats, policy, quantization_record
from yuanmoe.checkpoint.open import OpenCheckpoint, open_checkpoint
from yuanmoe.checkpoint.quantize.calibration import Calibrated, Calibration
from yuanmoe.checkpoint.quantize.encoding import EncodedWeight, Kept, Rounded, WeightEncoder, keeps
from yuanmoe.checkpoint.quantize.report import REPORT, read_report, report_of
from yuanmoe.checkpoint.write.save import contents_of
from yuanmoe.checkpoint.write.writer import WriteOptions, Written, write_checkpoint
from yuanmoe.errors import CheckpointError, UsageError
from yuanmoe.ops.quantize.packed_format import PackedFormat
from yuanmoe.plan.cost import Precision
from yuanmoe.storage.folder import check_apart, remove_leftovers

Method = Literal["rtn", "mse", "gptq"]
"""Round to nearest, scales of least squared error, or errors made up for on a calibration text."""

SHARD_BYTES = 1_000_000_000
"""A layer of M32 in 4 bits: what an interruption costs at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeJob:
    """A checkpoint and how it is to be quantized; of its weights nothing was read yet."""

    source: OpenCheckpoint
    precision: Precision
    method: Method
    calibration: Sequence[int]
    formats: Mapping[str, PackedFormat]
    """Of every weight that becomes codes; the others stay as they are."""

    def config_json(self) -> dict[str, Any]:
        """The config.json to write."""
        record = quantization_record(self.source.config, self.precision, self.method)
        if self.calibration:
            digest = hashlib.sha256(json.dumps(list(self.calibration)).encode()).hexdigest()
            record["calibration"] = {"tokens": len(self.calibration), "sha256": digest}
        described = native_config(self.source.config, main_dtype(self.source.tensors), self.source.origin)
        return described | {"quantization": record}

    def fingerprint(self) -> str:
        """A digest of all that the result depends on."""
        facts = [self.source.fingerprint(), self.config_json()]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeResult:
    """What there is now, and what it lost."""

    written: Written | None
    """None where the same command had written all of it before."""
    report: dict[str, Any]
    """The content of `quantization.json`, see `report.py`."""


def quantize_checkpoint(
    src: Path | str,
    dst: Path | str,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    roles: Mapping[str, int] | None = None,
    method: Method = "mse",
    calibration: Sequence[int] = (),
    ignore_unknown: bool = False,
    **options: Unpack[WriteOptions],
) -> QuantizeResult:
    """Write the checkpoint in `src` to `dst` in `bits`: `prepare` and `run` in one call, which see."""
    check_apart(src, dst)
    job = prepare(
        src,
        bits=bits,
        group_size=group_size,
        roles=roles,
        method=method,
        calibration=calibration,
        ignore_unknown=ignore_unknown,
    )
    return run(job, dst, **options)


def prepare(
    src: Path | str,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    roles: Mapping[str, int] | None = None,
    method: Method = "mse",
    calibration: Sequence[int] = (),
    ignore_unknown: bool = False,
) -> QuantizeJob:
    """Open a checkpoint of any format and settle the format of each weight.

    `bits` are 4 and `group_size` is 64, or those of a GPTQ source, unless given; `roles` have other bits than the
    default policy; `calibration` are the tokens of a text for `gptq`. Raises UsageError for what does not go together,
    and what `open_checkpoint` raises.
    """
    _check_method(method, calibration)
    source = open_checkpoint(src, ignore_unknown=ignore_unknown)
    if source.precision is not None:
        raise UsageError(f"{src} is quantized already; quantize the checkpoint that it was made from")
    group_size = group_size or _group_size(source)
    precision = policy(source.config, _bits(source) if bits is None else bits, group_size=group_size, roles=roles)
    formats = packed_formats(source.config, precision)
    if not formats:
        raise UsageError("every role stays as it is, so nothing would be quantized; yuanmoe convert does the rest")
    return QuantizeJob(source=source, precision=precision, method=method, calibration=calibration, formats=formats)


def run(job: QuantizeJob, dst: Path | str, **options: Unpack[WriteOptions]) -> QuantizeResult:
    """Write what was prepared to `dst`; again after an interruption, it goes on where it was, and keeps what is whole.

    Uses as many threads as torch. Raises what `writer.write_checkpoint` raises, and UsageError where `dst` holds the
    source.
    """
    source = job.source
    check_apart(source.path, dst)
    fingerprint = job.fingerprint()
    report = None if options.get("overwrite") else read_report(Path(dst))
    if report is not None and report.get("fingerprint") == fingerprint:
        remove_leftovers(Path(dst))
        return QuantizeResult(written=None, report=report)
    _check_numbers(source, job.formats)
    context = Calibration(source, job.calibration) if job.method == "gptq" else None
    with _workers() as pool:
        encoders = {name: _encoder(job, name, form, context) for name, form in job.formats.items()}
        ahead = 2 * torch.get_num_threads()
        weights = {name: EncodedWeight(name, encoder, pool, ahead) for name, encoder in encoders.items()}

        def report_with(facts: Mapping[str, Any]) -> dict[str, Any]:
            return {"fingerprint": fingerprint} | report_of(source, job.formats, job.method, facts)

        options.setdefault("shard_bytes", SHARD_BYTES)
        contents = contents_of(
            source,
            _tensors(source, weights),
            job.config_json(),
            facts=lambda names: _facts(weights, names),
            extras=lambda facts: {REPORT: report_with(facts)},
        )
        written = write_checkpoint(dst, contents, **options)
    return QuantizeResult(written=written, report=report_with(written.facts))


def _check_method(method: Method, calibration: Sequence[int]) -> None:
    if method not in get_args(Method):
        raise UsageError(f"method {method!r}; known: {', '.join(get_args(Method))}")
    if method == "gptq" and len(calibration) < 2:
        raise UsageError(
            "gptq rounds by a text: give it one, --calibration FILE, or take --method mse, which needs none"
        )
    if method != "gptq" and calibration:
        raise UsageError(f"{method} uses no calibration text; leave it out, or take --method gptq")


def _bits(source: OpenCheckpoint) -> int:
    """Those of a GPTQ source, so that its codes can be kept; else 4."""
    bits = (tensor.bits for tensor in source.stored.values() if isinstance(tensor, gptq.GPTQTensor))
    return next(bits, 4)


def _group_size(source: OpenCheckpoint) -> int:
    """What fits the codes of a GPTQ source, so that they can be kept; else 64."""
    sizes = (t.symmetric_group_size() for t in source.stored.values() if isinstance(t, gptq.GPTQTensor))
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


def _encoder(job: QuantizeJob, name: str, form: PackedFormat, context: Calibration | None) -> WeightEncoder:
    tensor = job.source.tensors[name]
    if job.source.format == "gptq" and keeps(tensor, form):
        return Kept(tensor, form)
    if context is not None and context.covers(name):
        return Calibrated(tensor, form, context, name)
    return Rounded(tensor, form, "rtn" if job.method == "rtn" else "mse")


def _check_numbers(source: OpenCheckpoint, formats: Mapping[str, PackedFormat]) -> None:
    """Raises CheckpointError where a tensor that stays whole holds an infinity or NaN; encoders check the others."""
    for name in layout(source.config).native:
        if name in formats:
            continue
        wrong = sum(int((~block.isfinite()).sum()) for block in source.tensors[name].blocks())
        source.release()
        if wrong:
            raise CheckpointError(
                f"{name} holds {wrong:,} values that are infinite or no numbers; the checkpoint in {source.path} is "
                "damaged, or its training diverged: `yuanmoe verify` tells, or quantize an earlier checkpoint"
            )


def _tensors(source: OpenCheckpoint, weights: Mapping[str, EncodedWeight]) -> dict[str, LazyTensor]:
    """Everything to write, in the order of the model."""
    tensors = {}
    for name in layout(source.config).native:
        if name in weights:
            tensors[f"{name}.codes"], tensors[f"{name}.scales"] = weights[name].lazy()
        else:
            tensors[name] = source.tensors[name]
    return tensors


def _facts(weights: Mapping[str, EncodedWeight], names: Iterable[str]) -> dict[str, Any]:
    """What was lost of the weights whose scales, the last of them to be written, are among `names`."""
    ready = (name.removesuffix(".scales") for name in names if name.endswith(".scales"))
    return {name: weights[name].facts() for name in ready}
