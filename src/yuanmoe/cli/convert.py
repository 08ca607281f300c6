"""`yuanmoe convert` and `yuanmoe verify`: checkpoints from one layout to another, and whether one is whole."""

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from yuanmoe.cli.terminal.models import Checkpoint
from yuanmoe.cli.terminal.output import Json, people, print_result
from yuanmoe.cli.terminal.progress import bytes_progress
from yuanmoe.units import format_size, parse_size


def convert(
    src: Checkpoint,
    dst: Annotated[Path, typer.Argument(help="The directory to write.")],
    to: Annotated[
        Literal["native", "official"], typer.Option(help="Ours, which loads without copying, or Hugging Face's.")
    ] = "native",
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; as stored by default.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST, once the new one is whole.")] = False,
    shard_size: Annotated[str, typer.Option(help="Largest file, a single tensor apart.")] = "5GB",
    rope_theta: Annotated[
        float | None, typer.Option(help="RoPE base, which official files lack: 10000 or 40890.")
    ] = None,
    ignore_unknown: Annotated[
        bool, typer.Option("--ignore-unknown", help="Go on where config keys or tensors are unknown.")
    ] = False,
    json_only: Json = False,
) -> None:
    """Write a checkpoint in another layout. Interrupted, it goes on where it was when called again."""
    from yuanmoe.checkpoint.formats.native_config import parse_dtype
    from yuanmoe.checkpoint.write.convert import convert_checkpoint

    console = people()
    start = time.perf_counter()
    with bytes_progress(f"{src.name} -> {dst.name}") as progress:
        written = convert_checkpoint(
            src,
            dst,
            to=to,
            dtype=parse_dtype(dtype) if dtype else None,
            overwrite=overwrite,
            shard_bytes=parse_size(shard_size),
            rope_theta=rope_theta,
            ignore_unknown=ignore_unknown,
            progress=progress,
            say=console.print,
        )
    seconds = time.perf_counter() - start
    console.print(f"{dst}: {written.tensors} tensors, {format_size(written.nbytes)} in {written.shards} files")
    print_result(
        {
            "path": str(written.path),
            "to": to,
            "tensors": written.tensors,
            "bytes": written.nbytes,
            "shards": written.shards,
            "resumed_shards": written.resumed_shards,
            "seconds": round(seconds, 3),
        },
        json_only,
    )


def verify(
    path: Checkpoint,
    ignore_unknown: Annotated[
        bool, typer.Option("--ignore-unknown", help="Go on where config keys or tensors are unknown.")
    ] = False,
    json_only: Json = False,
) -> None:
    """Check that a checkpoint is whole: names, shapes and dtypes, and the sha256 of the files that we wrote."""
    from yuanmoe.checkpoint.write.verify import verify_checkpoint

    console = people()
    with bytes_progress(path.name) as progress:
        found = verify_checkpoint(path, ignore_unknown=ignore_unknown, progress=progress)
    hashed = f"sha256 of {format_size(found.hashed_bytes)} as written" if found.hashed_bytes else "no sums to compare"
    console.print(
        f"{path}: {found.format}, {found.tensors} tensors, {format_size(found.nbytes)}, {hashed}", soft_wrap=True
    )
    print_result(
        {
            "path": str(path),
            "format": found.format,
            "tensors": found.tensors,
            "bytes": found.nbytes,
            "hashed_bytes": found.hashed_bytes,
        },
        json_only,
    )
