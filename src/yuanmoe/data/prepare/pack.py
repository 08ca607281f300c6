"""Text to a dataset: read in one process, tokenized in several, written in order; killed at any moment, it goes on.

The result depends on the sources, the tokenizer and the options, not on the number of workers nor on interruptions.
Memory holds a few chunks for each worker, whatever the size of the sources.
Not here: the program (`cli/data/command.py`), the Megatron format (`megatron.py`).
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from uuid import uuid4

from yuanmoe.data.prepare.chunks import Chunk, Place, chunks
from yuanmoe.data.prepare.formats import PARTS, DocumentEncoder, Encoded, FormatOptions, RecordBatch
from yuanmoe.data.prepare.output import JOURNAL, DatasetWriter
from yuanmoe.data.prepare.workers import map_ordered
from yuanmoe.data.sets.documents import no_progress
from yuanmoe.data.sets.manifest import ENDS
from yuanmoe.data.sets.packed import PackedTokens
from yuanmoe.data.sources.inputs import Inputs, SourceFile, find_inputs
from yuanmoe.errors import DataError
from yuanmoe.storage.folder import Kind, new_folder
from yuanmoe.text.tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)

READING = 2
"""Grows when the same sources and options give other tokens, so that what another version began is not gone on with."""
DATASET = Kind(noun="dataset", proof=ENDS, error=DataError)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackOptions:
    """Everything the result depends on besides sources and tokenizer."""

    read: FormatOptions = field(default_factory=FormatOptions)
    suffixes: tuple[str, ...] = ()
    """Files of folders to read; by default text, code, JSON lines and Parquet."""
    shard_tokens: int = 2**27
    """A shard ends with the chunk that fills it; what is not in a finished shard is done again after a kill."""
    chunk_bytes: int = 2**20
    """Text that a worker gets at once, or one document."""
    max_document_bytes: int = 2**26
    """A longer line, file or row is refused: a document is in memory as a whole, several times."""


def pack_dataset(
    paths: Sequence[str | Path],
    dst: str | Path,
    tokenizer: Tokenizer,
    options: PackOptions | None = None,
    *,
    workers: int = 1,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = no_progress,
    say: Callable[[str], None] = log.warning,
) -> list[PackedTokens]:
    """Tokenize the documents of files and folders into the dataset `dst`, beside it first.

    Where documents are held out, `dst` holds two datasets, `train` and `heldout`. `progress` receives bytes of the
    sources done and in all, of each dataset. After a DataError or ResourceError the same call goes on where it was.
    """
    options, dst = options or PackOptions(), Path(dst)
    inputs = find_inputs(
        paths,
        suffixes=options.suffixes,
        max_document_bytes=options.max_document_bytes,
        lines=options.read.one_document_a_line,
        skip_bad=options.read.skip_bad,
    )
    _check_apart(inputs, dst)
    parts = {part: replace(options, read=replace(options.read, part=part)) for part in PARTS}
    parts = parts if options.read.heldout_share else {"": options}
    kind = replace(DATASET, proof=(Path(next(iter(parts))) / ENDS).as_posix())
    with new_folder(dst.absolute(), overwrite=overwrite, kind=kind) as folder:
        for part, choices in parts.items():
            _write(folder / part, inputs, tokenizer, choices, workers, progress, say)
        for part in parts:
            (folder / part / JOURNAL).unlink()
    return [PackedTokens(dst / part) for part in parts]


def _write(
    folder: Path,
    inputs: Inputs,
    tokenizer: Tokenizer,
    options: PackOptions,
    workers: int,
    progress: Callable[[int, int], None],
    say: Callable[[str], None],
) -> None:
    with _output(folder, _fingerprint(inputs, options, tokenizer), tokenizer, options) as output:
        if output.resumed:
            say(f"going on in {folder}: {output.journal.num_tokens:,} tokens are there")
        pieces = chunks(
            inputs.files,
            options.read,
            chunk_bytes=options.chunk_bytes,
            max_document_bytes=options.max_document_bytes,
            start=output.place,
        )
        make = partial(_make_encoder, folder / tokenizer.file_name, options.read)
        with closing(map_ordered(make, pieces, workers=workers)) as done:
            for chunk, encoded in done:
                output.append(chunk, encoded)
                progress(chunk.read_bytes, inputs.size)
        output.finish(asdict(options), inputs.skipped)


def pack_texts(texts: Iterable[str], dst: str | Path, tokenizer: Tokenizer, *, overwrite: bool = False) -> PackedTokens:
    """Tokenize documents that are at hand into the dataset `dst`; special strings in them are plain text.

    Raises DataError when there is no text.
    """
    options = PackOptions()
    encoder = DocumentEncoder(tokenizer=tokenizer, options=options.read)
    with (
        new_folder(Path(dst).absolute(), overwrite=overwrite, kind=DATASET) as folder,
        _output(folder, uuid4().hex, tokenizer, options) as output,
    ):
        for number, text in enumerate(texts, 1):
            record = json.dumps({options.read.text_field: text}).encode()
            part = RecordBatch(name="document", first=number, json=True, records=[record])
            output.append(Chunk(after=Place(0, number)), encoder([part]))
        output.finish(asdict(options), Counter())
        (folder / JOURNAL).unlink()
    return PackedTokens(dst)


def _output(folder: Path, fingerprint: str, tokenizer: Tokenizer, options: PackOptions) -> DatasetWriter:
    return DatasetWriter(
        folder,
        fingerprint=fingerprint,
        tokenizer=tokenizer,
        masked=options.read.masked,
        shard_tokens=options.shard_tokens,
    )


def _make_encoder(tokenizer_file: Path, options: FormatOptions) -> Callable[[Chunk], Encoded]:
    encoder = DocumentEncoder(tokenizer=load_tokenizer(tokenizer_file), options=options)
    return lambda chunk: encoder(chunk.parts)


def _fingerprint(inputs: Inputs, options: PackOptions, tokenizer: Tokenizer) -> str:
    files = [(str(file.path.absolute()), file.size, file.modified_ns) for file in inputs.files]
    facts = json.dumps([READING, files, asdict(options), tokenizer.sha256])
    return hashlib.sha256(facts.encode(errors="surrogatepass")).hexdigest()


def _check_apart(inputs: Inputs, dst: Path) -> None:
    """Raise DataError where the result would replace, or be, one of its own sources."""
    target = dst.resolve()
    inside: list[SourceFile] = [file for file in inputs.files if target in file.path.resolve().parents]
    if inside:
        raise DataError(f"{inside[0].path} is read, and lies in {dst}, which is written; name another destination")
