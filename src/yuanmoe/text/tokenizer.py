"""Text to token ids and back: what every tokenizer of ours does, and which one a checkpoint has.

Special strings are split out before anything else; what lies between is ordinary text for the subclass to encode.
Tokens are bytes: they are joined first and decoded to text last, so that characters spread over tokens survive.
Source: the tokenizer set-up of IEIT-Yuan/Yuan2.0-M32 (`<eod>` ends a document, no begin token is ever added).
Not here: the two kinds of tokenizers (`sentencepiece_tokenizer`, `bpe`), conversations (`chat`).
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from yuanmoe.errors import TokenizerError, UsageError
from yuanmoe.shipped import model_folder
from yuanmoe.storage.whole_file import write_synced
from yuanmoe.text.chat_template import EOD, PAD, SEP, chat_template

FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE = "<FIM_PREFIX>", "<FIM_SUFFIX>", "<FIM_MIDDLE>"

FimMode = Literal["psm", "spm"]
Whitespace = Literal["strip", "keep"]


class Tokenizer(ABC):
    """Text to ids and back; `decode(encode(text)) == text` wherever the subclass does not say otherwise."""

    file_name: ClassVar[str]
    """Name of the file in a checkpoint directory."""

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        special_tokens: Mapping[str, int],
        *,
        marked_ids: Collection[int] = (),
        stripping: Collection[str] = (),
    ) -> None:
        """`token_bytes` by id, those of special tokens included.

        The first space of a token in `marked_ids` is only a mark where it starts a segment; text beside a special
        string of `stripping` loses its whitespace on that side.
        """
        self._token_bytes = tuple(token_bytes)
        self._marked_ids = frozenset(marked_ids)
        self._special_ids = frozenset(special_tokens.values())
        self._stripping = frozenset(stripping)
        longest_first = sorted(special_tokens, key=len, reverse=True)
        self._special_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self.special_tokens = dict(special_tokens)
        """Every special string and its id."""
        self.eod_id = self._special_id(EOD)
        """Ends a document and an answer."""
        self.sep_id = self._special_id(SEP)
        """Ends a question."""
        self.pad_id = self._special_id(PAD)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included; a model may have more rows (padding), never fewer."""
        return len(self._token_bytes)

    @cached_property
    def longest_token(self) -> int:
        """Bytes of the longest token: a text of more characters than n times this has more than n tokens.

        Except for whitespace that a tokenizer drops beside special strings.
        """
        return max(map(len, self._token_bytes))

    @cached_property
    def sha256(self) -> str:
        """Of the file that `save` writes: the same for two tokenizers that give the same ids."""
        return hashlib.sha256(self._to_file()).hexdigest()

    def encode(self, text: str, *, allow_special: bool = True) -> list[int]:
        """Ids of `text`, with nothing added around them.

        `allow_special=False` reads `<eod>` and the like as plain text: for text of strangers, who must not end a
        document or an instruction by typing it. Raises UsageError for a lone surrogate. Time linear in the text.
        """
        require_unicode(text)
        if not allow_special:
            return self._encode_ordinary(text)
        parts = ["", *self._special_pattern.split(text), ""]
        ids: list[int] = []
        for before, part, after in zip(parts[:-1:2], parts[1::2], parts[2::2], strict=True):
            ids += self._encode_ordinary(self._strip(part, before, after))
            if after:
                ids.append(self.special_tokens[after])
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False, previous: int | None = None) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD.

        `previous` is the id before the first one, where `ids` continue something (see `surface`).
        """
        pieces = []
        for token_id in ids:
            pieces.append(self.surface(token_id, previous, skip_special))
            previous = token_id
        return b"".join(pieces).decode(errors="replace")

    def surface(self, token_id: int, previous: int | None, skip_special: bool = False) -> bytes:
        """Bytes that a token adds to a text after the token `previous`; None is the start of a text.

        The space that marks the start of a segment (of a text, or of what follows a special token) is none of them.
        """
        data = self.token_bytes(token_id)
        if token_id in self._special_ids:
            return b"" if skip_special else data
        starts_segment = previous is None or previous in self._special_ids
        return data[1:] if starts_segment and token_id in self._marked_ids else data

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token on its own. Raises TokenizerError for an id that is none."""
        if not 0 <= token_id < self.vocab_size:
            raise TokenizerError(
                f"token id {token_id} is outside 0..{self.vocab_size - 1} of the tokenizer; a model's further rows are "
                "padding and must not be sampled, or the tokenizer belongs to another model"
            )
        return self._token_bytes[token_id]

    def token_text(self, token_id: int) -> str:
        """One token for display: its text, or its bytes as `<0xE4>` where they are part of a character."""
        data = self.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in data)

    def fim(self, prefix: str, suffix: str, mode: FimMode = "psm") -> list[int]:
        """Prompt for the text between `prefix` and `suffix`, both plain text (arXiv 2311.15786 section 4).

        The three parts were tokenized apart in training, so the answer is decoded without `previous`, also in `spm`,
        where it follows the prefix.
        """
        start, hole, middle = (self._special_id(name) for name in (FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE))
        before, after = (self.encode(text, allow_special=False) for text in (prefix, suffix))
        if mode == "psm":
            return [start, *before, hole, *after, middle]
        if mode == "spm":
            return [start, hole, *after, middle, *before]
        raise UsageError(f"FIM mode is {mode!r}; it must be 'psm' (prefix first) or 'spm' (suffix first)")

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer's file, and `tokenizer_config.json` for transformers and vLLM, into `directory`."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        common = {
            "add_bos_token": False,
            "add_eos_token": False,
            "eos_token": EOD,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
            # Batches are continued to the right.
            "padding_side": "left",
            "chat_template": chat_template(),
        }
        config = json.dumps(common | self._hf_config(), indent=2)
        write_synced(folder / self.file_name, self._to_file())
        write_synced(folder / "tokenizer_config.json", config.encode())

    @abstractmethod
    def _encode_ordinary(self, text: str) -> list[int]:
        """Ids of text in which nothing is special; never a special id."""

    @abstractmethod
    def _to_file(self) -> bytes:
        """Content of the file named `file_name`."""

    @abstractmethod
    def _hf_config(self) -> dict[str, Any]:
        """What this kind adds to `tokenizer_config.json`."""

    def _strip(self, text: str, before: str, after: str) -> str:
        text = text.lstrip() if before in self._stripping else text
        return text.rstrip() if after in self._stripping else text

    def _special_id(self, name: str) -> int:
        if name not in self.special_tokens:
            raise TokenizerError(
                f"{self.file_name} has no special token {name}, only {len(self.special_tokens)} others "
                f"({', '.join(self.special_tokens)}); use a tokenizer made for a Yuan model"
            )
        return self.special_tokens[name]


def load_tokenizer(path: str | Path, *, whitespace: Whitespace = "strip") -> Tokenizer:
    """The tokenizer of a checkpoint directory (or one file): `tokenizer.model`, else `tokenizer.json`.

    `small` is that of the shipped model. `whitespace` is for the official model, see `SentencePieceTokenizer`. Other
    files of the directory are not read: released `tokenizer_config.json`s ask for begin and end tokens that the models
    never saw. Raises TokenizerError.
    """
    # Imported here: each needs a native library that the other kind of checkpoint does without.
    path = model_folder(path)
    names = ("tokenizer.model", "tokenizer.json")
    file = next((file for file in (*(path / name for name in names), path) if file.is_file()), None)
    if file is None:
        raise TokenizerError(
            f"no tokenizer in {path}: neither {' nor '.join(names)} is there; "
            "copy the one that the model was published with into it"
        )
    if file.suffix == ".model":
        from yuanmoe.text.sentencepiece_tokenizer import SentencePieceTokenizer

        return SentencePieceTokenizer.from_file(file, whitespace=whitespace)
    from yuanmoe.text.bpe import BPETokenizer

    return BPETokenizer.from_file(file)


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int, eod_id: int | None = None) -> None:
    """Raise TokenizerError unless every id has a row among `vocab_size`, and `<eod>` is the model's `eod_id`."""
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"the tokenizer has ids 0..{tokenizer.vocab_size - 1}, the model's vocabulary ends at {vocab_size - 1} "
            f"({vocab_size} rows); use the tokenizer that the model was trained with"
        )
    if eod_id is not None and tokenizer.eod_id != eod_id:
        raise TokenizerError(
            f"the tokenizer's <eod> is {tokenizer.eod_id}, the model's is {eod_id}; "
            "use the tokenizer that the model was trained with"
        )


def require_unicode(text: str) -> None:
    """Raise UsageError for half of a surrogate pair, which no UTF-8 text holds and no token can stand for."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"character {error.start} of the text is the lone surrogate U+{ord(text[error.start]):04X}, which UTF-8 "
            "cannot hold; decode the text with errors='replace' where it is read"
        ) from None
