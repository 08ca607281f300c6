"""`yuanmoe quantize`: a checkpoint in 4 or 8 bits, what that costs and saves, and what it does to the answers.

Not here: the tables (`quantize_view.py`).
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from yuanmoe.cli.quantize.view import show_plan, show_quality, show_report
from yuanmoe.cli.terminal.models import Checkpoint, Threads
from yuanmoe.cli.terminal.output import Json, people, print_result
from yuanmoe.cli.terminal.progress import bytes_progress, tokens_progress
from yuanmoe.cli.terminal.text_file import read_tokens
from yuanmoe.errors import UsageError
from yuanmoe.units import format_size, parse_size

if TYPE_CHECKING:
    from yuanmoe.checkpoint.quantize.quantize import QuantizeJob, QuantizeResult

CALIBRATION_TOKENS = 32_768
"""By default: 2,048 for each of M32's experts, and 0.8 GiB of activations."""
EVAL_TOKENS = 8192


def quantize(
    src: Checkpoint,
    dst: Annotated[Path, typer.Argument(help="The directory to write.")],
    bits: Annotated[
        int | None, typer.Option(help="4 or 8, of experts and projections. [default: 4, or as in GPTQ files]")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Inputs that share a scale: 32, 64 or 128. [default: 64, or as in GPTQ files]")
    ] = None,
    method: Annotated[
        Literal["rtn", "mse", "gptq"] | None,
        typer.Option(
            help="rtn rounds to nearest; mse searches the scale of least error; gptq makes up for errors on a text. "
            "[default: gptq with --calibration, else mse]"
        ),
    ] = None,
    calibration: Annotated[Path | None, typer.Option(help="A UTF-8 text, or a dataset of tokens, for gptq.")] = None,
    calibration_tokens: Annotated[int, typer.Option(min=2, help="Read at most so many of it.")] = CALIBRATION_TOKENS,
    role: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROLE=BITS",
            help="Other bits for a role (4, 8, or 16: as it is), such as experts=4, attention=8, lfa=16, embedding=4; "
            "repeatable.",
        ),
    ] = None,
    evaluate: Annotated[
        Path | None, typer.Option("--eval", metavar="FILE", help="A text to compare both models on afterwards.")
    ] = None,
    eval_tokens: Annotated[int, typer.Option(min=2, help="Read at most so many of it.")] = EVAL_TOKENS,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST, once the new one is whole.")] = False,
    shard_size: Annotated[str, typer.Option(help="Largest file; what an interruption costs at most.")] = "1GB",
    threads: Threads = None,
    ignore_unknown: Annotated[
        bool, typer.Option("--ignore-unknown", help="Go on where config keys or tensors are unknown.")
    ] = False,
    json_only: Json = False,
) -> None:
    """Write a checkpoint in 4 or 8 bits, ready to be mapped and run; report what was lost.

    Weights stream through: memory stays below 4 GiB whatever their size. Interrupted, it goes on where it was when
    called again; called again when all is done, it shows the report.
    """
    console = people()
    start = time.perf_counter()
    from yuanmoe.ops.threads import use_threads

    use_threads(threads)
    method = method or ("gptq" if calibration else "mse")
    roles = dict(map(_parse_role, role or ()))
    ids = _tokens(src, calibration, calibration_tokens)
    eval_ids = _tokens(src, evaluate, eval_tokens)
    job = _prepare(
        src,
        dst,
        bits=bits,
        group_size=group_size,
        roles=roles,
        method=method,
        calibration=ids,
        ignore_unknown=ignore_unknown,
    )
    show_plan(console, job, dst, eval_ids)
    done = _write(console, job, dst, overwrite=overwrite, shard_bytes=parse_size(shard_size))
    show_report(console, done.report)
    if evaluate is not None:
        _evaluate(console, job, dst, evaluate, eval_ids, done.report)
    print_result(_result(dst, done) | {"seconds": round(time.perf_counter() - start, 3)}, json_only)


def _parse_role(text: str) -> tuple[str, int]:
    name, _, bits = text.partition("=")
    if not bits.isdecimal():
        raise UsageError(f"--role {text!r} is not ROLE=BITS; write it like embedding=8")
    return name, int(bits)


def _tokens(src: Path, file: Path | None, limit: int) -> list[int]:
    if file is None:
        return []
    from yuanmoe.text.tokenizer import load_tokenizer

    return read_tokens(file, load_tokenizer(src), limit)


def _prepare(src: Path, dst: Path, **settings: Any) -> "QuantizeJob":
    """What is wrong is said before anything is spent."""
    from yuanmoe.checkpoint.quantize.quantize import prepare
    from yuanmoe.storage.folder import check_apart

    check_apart(src, dst)
    with people().status(f"opening {src}"):
        return prepare(src, **settings)


def _write(console: Console, job: "QuantizeJob", dst: Path, **options: Any) -> "QuantizeResult":
    from yuanmoe.checkpoint.quantize.quantize import run

    try:
        with bytes_progress(f"{job.source.path.name} -> {dst.name}") as progress:
            done = run(job, dst, progress=progress, say=console.print, **options)
    except KeyboardInterrupt:
        console.print(f"stopped; the same command goes on with what is finished in {dst}.partial", soft_wrap=True)
        raise
    written = done.written
    if written is None:
        console.print(f"{dst} is whole already: the same command wrote it", soft_wrap=True)
    else:
        size = format_size(written.nbytes)
        console.print(f"{dst}: {written.tensors} tensors, {size} in {written.shards} files", soft_wrap=True)
    return done


def _evaluate(
    console: Console, job: "QuantizeJob", dst: Path, file: Path, ids: Sequence[int], report: dict[str, Any]
) -> None:
    """Compare both models on a text, show it, and add it to the report beside the weights."""
    from yuanmoe.checkpoint.quantize.report import REPORT
    from yuanmoe.evals.quality import quality
    from yuanmoe.storage.json_file import json_text
    from yuanmoe.storage.whole_file import write_synced

    try:
        with tokens_progress("reading with both models", 2 * len(ids)) as advance:
            report["quality"] = {"text": file.name} | quality(job.source, dst, ids, on_tokens=advance)
    except KeyboardInterrupt:
        console.print(f"stopped; {dst} is whole, and the same command measures again", soft_wrap=True)
        raise
    write_synced(dst / REPORT, json_text(report))
    show_quality(console, report["quality"])


def _result(dst: Path, done: "QuantizeResult") -> dict[str, Any]:
    written = done.written
    return {
        "command": "quantize",
        "path": str(dst),
        "shards": None if written is None else written.shards,
        "resumed_shards": None if written is None else written.resumed_shards,
    } | {key: value for key, value in done.report.items() if key != "fingerprint"}
