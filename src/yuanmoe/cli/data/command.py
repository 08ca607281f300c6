"""`yuanmoe data`: text to datasets of tokens, and a look at what is in them."""

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from yuanmoe.cli.terminal.models import OptionalTokenizer, Tokenizer
from yuanmoe.cli.terminal.output import Json, people, print_result
from yuanmoe.cli.terminal.progress import bytes_progress
from yuanmoe.errors import UsageError
from yuanmoe.units import format_count, format_size, parse_size

data = typer.Typer(
    help="Make datasets of tokens from text, and look into them.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
)

Dataset = Annotated[Path, typer.Argument(help="A dataset, or a Megatron pair by its name.")]


@data.command()
def pack(
    paths: Annotated[
        list[Path], typer.Argument(metavar="IN... OUT", help="Files and folders of text, then the result.")
    ],
    tokenizer: Tokenizer,
    form: Annotated[
        Literal["text", "chat", "alpaca", "sharegpt", "official", "official-sft"],
        typer.Option("--format", help="What a record is: text, a conversation (of three shapes), or official lines."),
    ] = "text",
    text_field: Annotated[str, typer.Option(help="Of JSON records and Parquet tables.")] = "text",
    suffix: Annotated[
        list[str] | None, typer.Option(help="Of files in folders to read, such as .py; repeat it.")
    ] = None,
    loss: Annotated[
        Literal["answers", "official"], typer.Option(help="In conversations: answers only, or the released rule.")
    ] = "answers",
    heldout: Annotated[
        float, typer.Option(min=0.0, max=0.5, help="Share of documents to keep apart: OUT/train and OUT/heldout.")
    ] = 0.0,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes, 0 for one a core; the result does not depend on it.")
    ] = 0,
    shard_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a file; an interrupted one is begun again.")] = 2
    ** 27,
    max_document: Annotated[str, typer.Option(help="Largest line, row or file that is one document.")] = "64MiB",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out records that cannot be read.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT, once the new one is whole.")] = False,
    json_only: Json = False,
) -> None:
    """Tokenize text, JSON lines (.gz, .zst), Parquet and folders of source code.

    Interrupted, it goes on where it was when called again.
    """
    from yuanmoe.data.prepare.formats import FormatOptions
    from yuanmoe.data.prepare.pack import PackOptions
    from yuanmoe.data.prepare.pack import pack_dataset as pack_files
    from yuanmoe.plan.device.machine import usable_cores
    from yuanmoe.text.tokenizer import load_tokenizer

    if len(paths) < 2:
        raise UsageError(f"one path, {paths[0]}, is given; name what to read, and then the folder to write")
    *sources, dst = paths
    read = FormatOptions(format=form, text_field=text_field, loss=loss, skip_bad=skip_bad, heldout_share=heldout)
    options = PackOptions(
        read=read,
        suffixes=tuple(name if name.startswith(".") else f".{name}" for name in suffix or ()),
        shard_tokens=shard_tokens,
        max_document_bytes=parse_size(max_document),
    )
    console, start, words = people(), time.perf_counter(), load_tokenizer(tokenizer)
    try:
        with bytes_progress(f"-> {dst}") as progress:
            choices = {
                "workers": workers or usable_cores(),
                "overwrite": overwrite,
                "progress": progress,
                "say": partial(console.print, markup=False),
            }
            made = pack_files(sources, dst, words, options, **choices)
    except KeyboardInterrupt:
        kept = f"interrupted; the finished shards are in {dst}.partial, the same command goes on with them"
        console.print(kept, soft_wrap=True, markup=False)
        raise
    for tokens in made:
        found = tokens.manifest
        console.print(
            f"{tokens.name}: {format_count(found.num_tokens)} tokens of {found.num_documents:,} documents, "
            f"{found.bytes_per_token:.2f} bytes each, in {found.num_shards} shards",
            soft_wrap=True,
            markup=False,
        )
        for reason, count in found.skipped.items():
            console.print(f"  left out: {count:,} {reason}", markup=False)
    print_result(
        {"datasets": [summary(tokens) for tokens in made], "seconds": round(time.perf_counter() - start, 3)}, json_only
    )


@data.command()
def info(path: Dataset, json_only: Json = False) -> None:
    """What a dataset holds, and what it was made of."""
    from yuanmoe.data.sets.datasets import open_documents
    from yuanmoe.data.sets.packed import PackedTokens

    tokens = open_documents(path)
    console = people()
    facts = summary(tokens)
    for name, value in facts.items():
        shown = ", ".join(f"{each} {value[each]}" for each in value) if isinstance(value, dict) else value
        console.print(f"{name:<18} {f'{shown:,}' if isinstance(shown, int) else shown}", soft_wrap=True, markup=False)
    settings = {"settings": tokens.manifest.settings} if isinstance(tokens, PackedTokens) else {}
    print_result(facts | settings, json_only)


@data.command("verify")
def verify_tokens(path: Dataset, tokenizer: OptionalTokenizer = None, json_only: Json = False) -> None:
    """Read all of a dataset: checksums, and whether every id is in the vocabulary."""
    from yuanmoe.data.sets.datasets import open_documents
    from yuanmoe.data.sets.verify import verify_dataset as verify_documents
    from yuanmoe.text.tokenizer import load_tokenizer

    tokens = open_documents(path)
    words = None if tokenizer is None else load_tokenizer(tokenizer)
    with bytes_progress(str(path)) as progress:
        read = verify_documents(tokens, words, progress)
    people().print(
        f"{path}: {format_count(tokens.num_tokens)} tokens, {format_size(read)} as they were written", markup=False
    )
    print_result(summary(tokens) | {"verified_bytes": read}, json_only)


@data.command()
def preview(
    path: Dataset,
    document: Annotated[int, typer.Option(min=0, help="Number of the document, from 0.")] = 0,
    tokens: Annotated[int, typer.Option(min=1, help="At most so many of its tokens.")] = 512,
    tokenizer: OptionalTokenizer = None,
    json_only: Json = False,
) -> None:
    """Show a document, and which of its tokens are to be learned: in green, or between {+ and +}."""
    from yuanmoe.cli.data.preview import preview_document

    print_result(preview_document(people(), path, document, tokens, tokenizer), json_only)


@data.command()
def export(
    src: Dataset,
    prefix: Annotated[Path, typer.Argument(help="Name of the pair, without .bin and .idx.")],
    vocab_size: Annotated[int | None, typer.Option(min=1, help="Of the tokenizer, where SRC does not say.")] = None,
    json_only: Json = False,
) -> None:
    """Write a dataset as a Megatron pair, NAME.bin and NAME.idx."""
    from yuanmoe.data.sets.datasets import open_documents
    from yuanmoe.data.sets.megatron import write_megatron

    tokens = open_documents(src)
    size = vocab_size or tokens.vocab_size
    if size is None:
        raise UsageError(f"{src} does not say how many ids there are; give --vocab-size")
    with bytes_progress(f"{src} -> {prefix}") as progress:
        write_megatron(tokens, prefix, vocab_size=size, progress=progress)
    people().print(
        f"{prefix}: {tokens.num_documents:,} documents, {format_count(tokens.num_tokens)} tokens", markup=False
    )
    print_result(summary(tokens) | {"path": str(prefix)}, json_only)


def summary(tokens: Any) -> dict[str, Any]:
    """A dataset in JSON values."""
    facts = {"path": tokens.name, "documents": tokens.num_documents, "tokens": tokens.num_tokens}
    manifest = getattr(tokens, "manifest", None)
    if manifest is None:
        return facts | {"format": "megatron"}
    left = asdict(manifest)
    wanted = (
        "vocab_size",
        "tokenizer_sha256",
        "text_bytes",
        "trained_tokens",
        "source_files",
        "source_bytes",
        "skipped",
    )
    return facts | {"format": "yuanmoe-tokens", "shards": manifest.num_shards} | {name: left[name] for name in wanted}
