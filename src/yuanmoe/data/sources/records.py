"""Records of source files as a stream: lines, whole files, rows of tables; plain, gzip or zstd, in bounded memory.

A record becomes a document later (`formats.py`), in another process. Files are hashed while they are read.
Not here: which files (`inputs.py`).
"""

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from yuanmoe.data.sources.inputs import SourceFile
from yuanmoe.data.sources.rows import row_json
from yuanmoe.errors import DataError, MissingExtraError

BLOCK_BYTES = 1 << 20
# A block of zstd that says "128 KiB of one byte" takes 4 bytes: more input at once could be too much output.
ZSTD_BLOCK_BYTES = 1 << 12

Record = bytes


class Reader:
    """The records of one file, read from its start to its end; then `sha256` is known."""

    def __init__(
        self,
        file: SourceFile,
        *,
        one_document_a_line: bool,
        max_bytes: int,
        columns: tuple[str, ...],
        further_columns: tuple[str, ...] = (),
        other_columns: str = "name the right one (--text-field)",
    ) -> None:
        """Records of tables have `columns`, of which at least one must be there, and `further_columns`.

        `other_columns` is the advice for a table that has none of `columns`.
        """
        self.file = file
        self.container = file.container(one_document_a_line=one_document_a_line)
        self.json = self.container == "parquet" or file.holds_json
        """Whether records are JSON objects; else they are text."""
        self._max_bytes, self._columns = max_bytes, columns
        self._further_columns, self._other_columns = further_columns, other_columns
        self._digest = hashlib.sha256()
        self._hashed_bytes = self._decoded_bytes = 0

    @property
    def sha256(self) -> str:
        """Of what was read so far: of the file, once all records are out."""
        return self._digest.hexdigest()

    @property
    def read_bytes(self) -> int:
        """How much of the file is behind."""
        return max(self._hashed_bytes, self._decoded_bytes)

    def count(self, data: memoryview) -> None:
        """Bytes of the file on their way to a record."""
        self._digest.update(data)
        self._hashed_bytes += len(data)

    def __iter__(self) -> Iterator[Record]:
        """Raises DataError with the place of the trouble: unreadable, cut short, changed meanwhile, too long."""
        try:
            if self.container == "parquet":
                yield from self._rows()
            with self.file.path.open("rb") as raw:
                hashed = io.BufferedReader(_Hashed(raw, self), BLOCK_BYTES)
                if self.container != "parquet":
                    yield from self._of_stream(hashed)
                while hashed.read(BLOCK_BYTES):  # what is left of a file, so that the sum is of all of it
                    pass
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"cannot read {self.file.name} after {self.read_bytes} bytes of it: {error}") from error
        if self._hashed_bytes != self.file.size:
            raise DataError(
                f"{self.file.name} changed while it was read: {self.file.size} bytes before, {self._hashed_bytes} now; "
                "run the command again when it is complete"
            )

    def _of_stream(self, raw: io.BufferedIOBase) -> Iterator[Record]:
        stream = _decompressed(raw, self.file)
        if self.container == "whole":
            record = stream.read(self._max_bytes + 1)
            self._check_size(len(record), 1)
            yield record
            return
        number = 0
        while record := stream.readline(self._max_bytes + 1):
            number += 1
            self._check_size(len(record), number)
            yield record

    def _check_size(self, size: int, number: int) -> None:
        if size > self._max_bytes:
            raise DataError(
                f"{self.file.name}, record {number}, is longer than {self._max_bytes} bytes, the most that a document "
                "may have (--max-document); raise that if the memory allows, or split the document"
            )

    def _rows(self) -> Iterator[Record]:
        """Rows as JSON objects of the wanted columns, in batches of about a block."""
        parquet = _import("pyarrow.parquet", "pyarrow", self.file)
        arrow = _import("pyarrow", "pyarrow", self.file)
        try:
            schema = parquet.read_metadata(self.file.path).schema
            leaves = (schema.column(place) for place in range(len(schema.names)))
            strings = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
            # A text that a file has once, for a thousand rows, would otherwise be in memory a thousand times.
            options = {"memory_map": True, "read_dictionary": strings}
            with closing(parquet.ParquetFile(self.file.path, **options)) as table:
                yield from self._of_table(table)
        except arrow.ArrowException as error:
            raise DataError(f"{self.file.name} is no readable Parquet file: {error}") from error

    def _of_table(self, table: Any) -> Iterator[Record]:
        names = table.schema_arrow.names
        if not any(name in names for name in self._columns):
            raise DataError(
                f"{self.file.name} has the columns {', '.join(names)}, none of {', '.join(self._columns)}; "
                f"{self._other_columns}"
            )
        columns = [name for name in (*self._columns, *self._further_columns) if name in names]
        number = 0
        for group in range(table.num_row_groups):
            rows = self._batch_rows(table.metadata.row_group(group), group, columns)
            for batch in table.iter_batches(rows, row_groups=[group], columns=columns):
                for place in range(batch.num_rows):
                    number += 1
                    record = row_json({name: batch.column(name)[place] for name in columns})
                    self._check_size(len(record), number)
                    yield record
            self._decoded_bytes = self.file.size * (group + 1) // table.num_row_groups

    def _batch_rows(self, facts: Any, group: int, columns: list[str]) -> int:
        """How many rows of a group to decode at once. Raises DataError for rows that would not fit in memory."""
        leaves = [facts.column(place) for place in range(facts.num_columns)]
        wanted = [leaf for leaf in leaves if leaf.path_in_schema.split(".")[0] in columns]
        row_bytes = sum(leaf.total_uncompressed_size for leaf in wanted) // max(1, facts.num_rows)
        if row_bytes > self._max_bytes:
            raise DataError(
                f"{self.file.name}, row group {group}: {facts.num_rows} rows of {row_bytes} bytes on average, a "
                f"document is at most {self._max_bytes} (--max-document); raise that, or split the documents"
            )
        return max(1, min(1024, BLOCK_BYTES // max(1, row_bytes)))


class _Hashed(io.RawIOBase):
    """A file whose every byte passes through its reader's checksum."""

    def __init__(self, raw: io.BufferedIOBase, reader: Reader) -> None:
        self._raw, self._reader = raw, reader

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._raw.readinto(buffer)
        self._reader.count(buffer[:count])
        return count


class _Zstd(io.RawIOBase):
    """A zstd stream of any number of frames; unlike the library's own, one that is cut short is an error."""

    def __init__(self, raw: io.BufferedIOBase, library: Any) -> None:
        self._raw, self._library = raw, library
        self._frame = library.ZstdDecompressor().decompressobj()
        self._begun = False
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            data = self._raw.read(ZSTD_BLOCK_BYTES)
            if not data:
                if self._begun:
                    raise EOFError("the last zstd frame has no end, the file is cut short")
                return 0
            self._output = memoryview(self._decompress(data))
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def _decompress(self, data: bytes) -> bytes:
        parts = []
        while data:
            self._begun = True
            try:
                parts.append(self._frame.decompress(data))
            except self._library.ZstdError as error:
                raise OSError(error) from error
            data = b""
            if self._frame.eof:
                data, self._begun = self._frame.unused_data, False
                self._frame = self._library.ZstdDecompressor().decompressobj()
        return b"".join(parts)


def _decompressed(raw: io.BufferedIOBase, file: SourceFile) -> Any:
    if file.compression == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if file.compression == ".zst":
        return io.BufferedReader(_Zstd(raw, _import("zstandard", "zstandard", file)), BLOCK_BYTES)
    return raw


def _import(module: str, package: str, file: SourceFile) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{file.name} needs {package}, which is not installed; pip install 'yuanmoe[train]', or write the text as "
            "plain JSON lines"
        ) from error
