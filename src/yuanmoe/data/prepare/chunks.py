"""The records of all sources cut into pieces of work, each with the place at which to go on after it.

A piece depends on the records since the one before it and on nothing else, so a stream that is taken up at any such
place is cut as if it had never stopped.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from yuanmoe.data.prepare.formats import FormatOptions, RecordBatch
from yuanmoe.data.sources.inputs import SourceFile
from yuanmoe.data.sources.records import Reader


class Place(NamedTuple):
    """Between two records."""

    file: int
    """How many files are behind."""
    records: int
    """How many records of the next one are."""


class Finished(NamedTuple):
    """A source file that was read to its end."""

    path: str
    bytes: int
    sha256: str


@dataclass(slots=True, kw_only=True)
class Chunk:
    """Some records in a row."""

    after: Place
    read_bytes: int = 0
    """Of all files, up to here."""
    parts: list[RecordBatch] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)
    """Files whose last record is in here."""


def chunks(
    files: Sequence[SourceFile], options: FormatOptions, *, chunk_bytes: int, max_document_bytes: int, start: Place
) -> Iterator[Chunk]:
    """All records after `start`, `chunk_bytes` at a time or one more. Raises DataError where a file cannot be read."""
    chunk, size = Chunk(after=start), 0
    behind = sum(file.size for file in files[: start.file])
    for number in range(start.file, len(files)):
        file = files[number]
        reader = Reader(
            file,
            one_document_a_line=options.one_document_a_line,
            max_bytes=max_document_bytes,
            columns=options.columns,
            further_columns=options.further_columns,
            other_columns=options.other_columns,
        )
        skipped = start.records if number == start.file else 0
        part: RecordBatch | None = None
        for count, record in enumerate(reader, 1):
            if count <= skipped:
                continue
            if part is None:
                part = RecordBatch(name=file.name, first=count, json=reader.json, records=[])
                chunk.parts.append(part)
            part.records.append(record)
            size += len(record)
            if size >= chunk_bytes:
                chunk.after, chunk.read_bytes = Place(number, count), behind + reader.read_bytes
                yield chunk
                chunk, size, part = Chunk(after=chunk.after), 0, None
        behind += file.size
        chunk.after, chunk.read_bytes = Place(number + 1, 0), behind
        chunk.finished.append(Finished(file.name, file.size, reader.sha256))
    yield chunk
