"""Records to documents of tokens: text, conversations, and the official form of one document a line.

The official form (IEIT-Yuan/Yuan2.0-M32, docs/data_process.md and tools/preprocess_data_yuan.py): inner newlines are
written `<n>`, `[SEP]` is `<sep>`, U+2583 and carriage returns are dropped, as are a leading `<n>` and outer whitespace.
Text of strangers cannot type special tokens; only the official form has one, `<sep>`.
This is what runs in every worker process. Not here: files (`records.py`), what is written (`output.py`).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args
from unicodedata import normalize

import numpy as np
import numpy.typing as npt

from yuanmoe.data.prepare.conversations import COLUMNS, FURTHER_COLUMNS, SHOWN, ConversationShape, conversation_of
from yuanmoe.data.prepare.finetuning import encode_line, encode_turns, first_sep_mask
from yuanmoe.errors import DataError, UsageError
from yuanmoe.text.chat_template import SEP, Newline
from yuanmoe.text.sentencepiece_tokenizer import unescape_newlines
from yuanmoe.text.tokenizer import Tokenizer

Format = Literal["text", "chat", "alpaca", "sharegpt", "official", "official-sft"]
Half = Literal["train", "heldout"]
LossRule = Literal["answers", "official"]

PARTS: tuple[Half, ...] = ("train", "heldout")
BINARY_PROBE_BYTES = 8192
ELSEWHERE = "of the other part"


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatOptions:
    """How records are read."""

    format: Format = "text"
    """`text` (a whole file, or a field of a record), `chat` (messages, or prompt and completion), `alpaca` and
    `sharegpt` (conversations of these shapes), `official` (one document a line, newlines as `<n>`) or `official-sft`
    (such lines as `instruction<sep>response`, with a loss mask)."""
    text_field: str = "text"
    """Of JSON records and tables."""
    loss: LossRule = "answers"
    """`answers` of every turn, or `official`: all from the first `<sep>` on."""
    newline: Newline = "newline"
    """Between the turns of a conversation."""
    skip_bad: bool = False
    """Leave out records that cannot be read, and count them, instead of stopping."""

    heldout_share: float = 0.0
    """Of documents, chosen by their text, so that copies stay together: to measure with, not to learn."""
    part: Half = "train"
    """Which of the two is read."""

    @property
    def one_document_a_line(self) -> bool:
        return self.format in ("official", "official-sft")

    @property
    def shape(self) -> ConversationShape | None:
        """Of conversations; None where records are no conversations."""
        return next((shape for shape in get_args(ConversationShape) if shape == self.format), None)

    @property
    def masked(self) -> bool:
        return self.shape is not None or self.format == "official-sft"

    @property
    def columns(self) -> tuple[str, ...]:
        """Of tables; at least one must be there."""
        return COLUMNS[self.shape] if self.shape else (self.text_field,)

    @property
    def further_columns(self) -> tuple[str, ...]:
        """Of tables, where they are there."""
        return FURTHER_COLUMNS[self.shape] if self.shape else ()

    @property
    def other_columns(self) -> str:
        """What to do about a table that has none of these columns."""
        if self.shape is None:
            return "name the right one (--text-field)"
        shapes = ", ".join(f"{shape} reads {' and '.join(columns)}" for shape, columns in COLUMNS.items())
        return f"choose the --format of its conversations: {shapes}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordBatch:
    """Neighbouring records of one file."""

    name: str
    first: int
    """The number of the first record, from 1."""
    json: bool
    """Whether records are JSON objects; else they are text."""
    records: list[bytes]


@dataclass(slots=True, kw_only=True)
class Encoded:
    """Documents of some records, one after another."""

    ids: npt.NDArray[Any]
    lengths: npt.NDArray[np.int64]
    mask: npt.NDArray[np.bool_] | None
    text_bytes: int
    skipped: Counter[str]


@dataclass(slots=True)
class _Document:
    ids: list[int]
    mask: list[bool] | None
    text_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentEncoder:
    """Turns records into tokens; the same records give the same tokens, wherever and whenever."""

    tokenizer: Tokenizer
    options: FormatOptions = field(default_factory=FormatOptions)

    def __call__(self, parts: Iterable[RecordBatch]) -> Encoded:
        """Raises DataError with the place of a record that cannot be read, unless those are skipped."""
        skipped: Counter[str] = Counter()
        documents: list[_Document] = []
        for part in parts:
            for number, record in enumerate(part.records, part.first):
                found = self._guarded(part, number, record)
                if isinstance(found, str):
                    skipped[found] += 1
                else:
                    documents.append(found)
        dtype = np.uint16 if self.tokenizer.vocab_size <= 2**16 else np.uint32
        ids = [np.array(document.ids, dtype=dtype) for document in documents]
        masks = [np.array(document.mask, dtype=np.bool_) for document in documents if document.mask is not None]
        return Encoded(
            ids=np.concatenate(ids) if ids else np.empty(0, dtype),
            lengths=np.array([len(document.ids) for document in documents], dtype=np.int64),
            mask=(np.concatenate(masks) if masks else np.empty(0, np.bool_)) if self.options.masked else None,
            text_bytes=sum(document.text_bytes for document in documents),
            skipped=skipped,
        )

    def _guarded(self, part: RecordBatch, number: int, record: bytes) -> _Document | str:
        """The document of a record, or the reason to leave it out."""
        try:
            return self._document(part, record)
        except (ValueError, RecursionError) as error:  # UsageError is a ValueError too
            if self.options.skip_bad:
                return self._left_out("unreadable record")
            raise DataError(
                f"{part.name}, record {number}: {error}. Mend it, or leave such records out (--skip-bad)"
            ) from None

    def _is_elsewhere(self, text: str) -> bool:
        """Whether a document belongs to the other part: chosen by its text without differences that a copy may have."""
        if not self.options.heldout_share:
            return False
        plain = " ".join(normalize("NFC", text).split())
        chance = int.from_bytes(hashlib.blake2b(plain.encode(errors="surrogatepass"), digest_size=8).digest())
        return (chance < self.options.heldout_share * 2**64) != (self.options.part == "heldout")

    def _left_out(self, reason: str) -> str:
        """What has no text to choose by is counted in one part only."""
        return ELSEWHERE if self.options.heldout_share and self.options.part == "heldout" else reason

    def _document(self, part: RecordBatch, record: bytes) -> _Document | str:
        if not part.json and b"\0" in record[:BINARY_PROBE_BYTES]:
            return self._left_out("binary")
        try:
            text = record.decode("utf-8-sig", errors="surrogatepass" if part.json else "strict")
        except UnicodeDecodeError:
            if part.json or self.options.one_document_a_line:
                raise
            return self._left_out("not UTF-8")
        values = _json_object(text) if part.json and text.strip() else {}
        if part.json and not values:
            return self._left_out("empty")
        if self.options.shape:
            return self._conversation(values if part.json else None, self.options.shape)
        return self._of_text(self._text(values) if part.json else text.replace("\r\n", "\n"))

    def _text(self, values: dict[str, Any]) -> str:
        text = values.get(self.options.text_field, 0)
        if text is None:  # a null of a table
            return ""
        if not isinstance(text, str):
            if self.options.text_field in values:
                raise UsageError(
                    f"no text in the field {self.options.text_field!r} but {type(text).__name__} {str(text)[:SHOWN]}"
                )
            names = ", ".join([*values][:20])
            raise UsageError(
                f"no text in the field {self.options.text_field!r}, the record has {names}; name another with "
                "--text-field"
            )
        return text

    def _of_text(self, text: str) -> _Document | str:
        if self.options.one_document_a_line:
            text = clean_line(text)
        if not text.strip():
            return self._left_out("empty")
        if self._is_elsewhere(text):
            return ELSEWHERE
        size = len(text.encode(errors="surrogatepass"))
        if not self.options.one_document_a_line:
            return _Document([*self.tokenizer.encode(text, allow_special=False), self.tokenizer.eod_id], None, size)
        ids = encode_line(self.tokenizer, text)
        mask = first_sep_mask(ids, self.tokenizer.sep_id) if self.options.masked else None
        return _Document(ids, mask, size)

    def _conversation(self, values: dict[str, Any] | None, shape: ConversationShape) -> _Document | str:
        if values is None:
            raise UsageError("conversations are read from .jsonl (also .gz, .zst) and .parquet files, this is none")
        turns = conversation_of(values, shape)
        # Each turn on its own, so that no text of one can look like two.
        if self._is_elsewhere(
            json.dumps([(turn.role, " ".join(turn.text.split())) for turn in turns], ensure_ascii=False)
        ):
            return ELSEWHERE
        ids, mask = encode_turns(self.tokenizer, turns, newline=self.options.newline)
        if self.options.loss == "official":
            mask = [each and turns[-1].learned for each in first_sep_mask(ids, self.tokenizer.sep_id)]
        if not any(mask):
            return "nothing to learn"
        return _Document(ids, mask, sum(len(turn.text.encode()) for turn in turns))


def clean_line(line: str) -> str:
    """A line of the official form as text, `<sep>` still in it."""
    line = line.replace("[SEP]", SEP).replace("\u2583", "").replace("\r", "").strip()
    return unescape_newlines(line.removeprefix("<n>")).strip()


def _json_object(text: str) -> dict[str, Any]:
    values = json.loads(text)
    if not isinstance(values, dict):
        raise UsageError(f"a {type(values).__name__} where a JSON object is wanted")
    return values
