"""Byte-level BPE for small models of our own: one `tokenizer.json`, trained in seconds on any text.

Source: byte-level BPE as in GPT-2 (Radford et al. 2019, section 2.2), with digits apart as in Yuan's tokenizer, and
runs of whitespace together, for code. The special tokens are Yuan's and come first: `<eod>` 0, `<sep>` 1, `<pad>` 2.
Not here: the released tokenizer (`sentencepiece_tokenizer`).
"""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from yuanmoe.errors import TokenizerError, UsageError
from yuanmoe.text.chat_template import EOD, PAD, SEP
from yuanmoe.text.tokenizer import FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX, Tokenizer, require_unicode

SPECIAL_TOKENS = (EOD, SEP, PAD, FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE)

# What merges never cross. In this order: a word and the space before it, one digit, punctuation and the space before
# it, whitespace up to the space that belongs to what follows, other whitespace.
WORDS = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

log = logging.getLogger(__name__)


class BPETokenizer(Tokenizer):
    """Byte-level BPE; `decode(encode(text)) == text` for every text."""

    file_name = "tokenizer.json"

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Raises TokenizerError when `backend` is not byte-level BPE or lacks `<eod>`, `<sep>` or `<pad>`."""
        if not isinstance(backend.model, models.BPE) or not isinstance(backend.decoder, decoders.ByteLevel):
            raise TokenizerError(
                f"a {type(backend.model).__name__} model with decoder {type(backend.decoder).__name__} is not "
                "byte-level BPE; if transformers made it from the released tokenizer.model, use that file itself: "
                "the conversion changes ids"
            )
        backend.encode_special_tokens = True  # as plain text; the base class splits them out where they are allowed
        self._backend = backend
        added = sorted(backend.get_added_tokens_decoder().items())
        special_tokens = {token.content: token_id for token_id, token in added if token.special}
        super().__init__(_token_bytes(backend.get_vocab(), {token.content for _, token in added}), special_tokens)

    @classmethod
    def from_file(cls, path: Path) -> "BPETokenizer":
        """Open a `tokenizer.json`. Raises TokenizerError when it is damaged or of another kind."""
        try:
            backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises nothing narrower
            raise TokenizerError(f"{path} is no tokenizer.json ({error}); fetch or train it again") from error
        try:
            return cls(backend)
        except TokenizerError as error:
            raise TokenizerError(f"{path}: {error}") from error

    def _encode_ordinary(self, text: str) -> list[int]:
        # `encode` would keep Python's lock for seconds on a long text; `encode_batch` gives it to other threads.
        return self._backend.encode_batch([text], add_special_tokens=False)[0].ids

    def _to_file(self) -> bytes:
        return self._backend.to_str(pretty=True).encode()

    def _hf_config(self) -> dict[str, Any]:
        return {"tokenizer_class": "PreTrainedTokenizerFast"}


def train_bpe(texts: Iterable[str], vocab_size: int, *, max_characters: int = 2**28) -> BPETokenizer:
    """Learn `vocab_size` tokens (fewer if the texts give no more) from `texts`, which are read once, one at a time.

    The same texts give the same tokenizer on every machine. At most `max_characters` are read, which bounds memory:
    different words are kept, about a quarter of a gigabyte for 31 million characters of Python. Raises UsageError.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise UsageError(
            f"vocab_size {vocab_size} is below {smallest}: 256 bytes and {len(SPECIAL_TOKENS)} special tokens"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_first(texts, max_characters), trainer)
    return BPETokenizer(backend)


def _first(texts: Iterable[str], max_characters: int) -> Iterator[str]:
    left = max_characters
    for text in texts:
        require_unicode(text)
        if left <= 0:
            log.warning("the tokenizer is trained on the first %d characters of its texts only", max_characters)
            return
        yield text[:left]
        left -= len(text)


def _token_bytes(vocab: dict[str, int], added: set[str]) -> list[bytes]:
    """Bytes of every id; byte-level BPE spells each byte as one printable character, but not in added tokens."""
    byte_of = {character: byte for byte, character in enumerate(_byte_characters())}
    texts = {token_id: text for text, token_id in vocab.items()}
    if sorted(texts) != list(range(len(vocab))):
        raise TokenizerError(f"{len(vocab)} tokens do not have the ids 0..{len(vocab) - 1}; train the tokenizer again")
    try:
        return [
            text.encode() if text in added else bytes(byte_of[character] for character in text)
            for _, text in sorted(texts.items())
        ]
    except KeyError as error:
        raise TokenizerError(f"a token holds the character {error}, which spells no byte; train it again") from None


def _byte_characters() -> list[str]:
    """The character of each byte: itself where it is printable, else the next free one from U+0100 on (GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
