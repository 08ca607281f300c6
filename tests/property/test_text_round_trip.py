"""Text survives tokenizing: both kinds of tokenizers, the released one included, on arbitrary Unicode."""

import itertools
import time
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from small_tokenizers import SMALL, TEXT, TEXTS, bpe, sentencepiece_model, small_sentencepiece
from yuanmoe.errors import UsageError
from yuanmoe.text.bpe import train_bpe
from yuanmoe.text.sentencepiece_tokenizer import SentencePieceTokenizer
from yuanmoe.text.tokenizer import Tokenizer, load_tokenizer

SPACE_MARK = "\u2581"


@pytest.fixture(scope="module")
def official(sentencepiece_folder: Path) -> SentencePieceTokenizer:
    tokenizer = load_tokenizer(sentencepiece_folder, whitespace="keep")
    assert isinstance(tokenizer, SentencePieceTokenizer)
    return tokenizer


@given(text=TEXT, allow_special=st.booleans())
def test_byte_level_bpe(text: str, allow_special: bool) -> None:
    assert bpe().decode(bpe().encode(text, allow_special=allow_special)) == text


@given(text=TEXT, allow_special=st.booleans())
def test_sentencepiece(text: str, allow_special: bool) -> None:
    tokenizer = small_sentencepiece()
    assert tokenizer.decode(tokenizer.encode(text, allow_special=allow_special)) == text.replace(SPACE_MARK, " ")


@given(text=TEXT, allow_special=st.booleans())
def test_official(official: Tokenizer, text: str, allow_special: bool) -> None:
    assert official.decode(official.encode(text, allow_special=allow_special)) == text.replace(SPACE_MARK, " ")


def test_the_space_mark_is_the_one_exception() -> None:
    tokenizer = small_sentencepiece()
    assert tokenizer.decode(tokenizer.encode(f"a{SPACE_MARK}b")) == "a b"


@given(text=TEXT)
def test_stripping_drops_whitespace_beside_added_tokens_only(text: str) -> None:
    """The reference splits at each added token alone; `<eod>`, `<s>` and `<unk>` keep their whitespace."""
    tokenizer = small_sentencepiece("strip")
    kept = text.replace(SPACE_MARK, " ")
    for added in ("<sep>", "<pad>", "<FIM_MIDDLE>"):
        parts = kept.split(added)
        strips = [(place > 0, place < len(parts) - 1) for place in range(len(parts))]
        stripped = [_stripped(part, *sides) for part, sides in zip(parts, strips, strict=True)]
        kept = added.join(stripped)
    assert tokenizer.decode(tokenizer.encode(text)) == kept


def _stripped(part: str, left: bool, right: bool) -> str:
    part = part.lstrip() if left else part
    return part.rstrip() if right else part


@pytest.mark.parametrize("kind", SMALL)
@given(text=TEXT)
def test_no_special_id_from_plain_text(kind: str, text: str) -> None:
    tokenizer = SMALL[kind]()
    assert not set(tokenizer.special_tokens.values()) & set(tokenizer.encode(text, allow_special=False))


@given(text=TEXT)
def test_user_defined_pieces_are_spelled_in_plain_text(text: str) -> None:
    """SentencePiece finds "user defined" pieces in any text, so `<eod>` is spelled in bytes where it is not meant."""
    tokenizer = SentencePieceTokenizer(sentencepiece_model(("<eod>", "<sep>")), whitespace="keep")
    ids = tokenizer.encode(text, allow_special=False)
    assert not {tokenizer.eod_id, tokenizer.sep_id} & set(ids)
    assert tokenizer.decode(ids) == text.replace(SPACE_MARK, " ")
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace(SPACE_MARK, " ")


@given(text=TEXT)
def test_special_tokens_cut_the_text(text: str) -> None:
    """A special token separates: what is beside it is tokenized as if it stood alone."""
    for tokenizer in (bpe(), small_sentencepiece()):
        alone = tokenizer.encode(text)
        assert tokenizer.encode(f"{text}<eod>{text}") == [*alone, tokenizer.eod_id, *alone]


@given(text=TEXT)
def test_sentencepiece_agrees_with_its_library(text: str) -> None:
    """On plain text we add nothing to the library's own encoding, and decode as it does."""
    library = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    ids = small_sentencepiece().encode(text, allow_special=False)
    assert ids == library.encode(text)
    assert small_sentencepiece().decode(ids) == library.decode(ids)


@given(text=TEXT)
def test_bpe_agrees_with_its_library(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    """The saved file, in the library's hands, does what we do, special tokens included."""
    folder = tmp_path_factory.getbasetemp() / "bpe"
    if not folder.exists():
        bpe().save(folder)
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = bpe().encode(text)
    assert ids == library.encode(text).ids
    assert bpe().decode(ids) == library.decode(ids, skip_special_tokens=False)
    assert bpe().decode(ids, skip_special=True) == library.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("text", ["a\ud800b", "\udfff"])
def test_lone_surrogates_are_an_error(kind: str, text: str) -> None:
    place = next(index for index, character in enumerate(text) if "\ud800" <= character <= "\udfff")
    expected = rf"character {place} of the text is the lone surrogate U\+D[8F].*errors='replace'"
    with pytest.raises(UsageError, match=expected):
        SMALL[kind]().encode(text)
    with pytest.raises(UsageError, match=expected):
        train_bpe([text], 300)


@pytest.mark.parametrize("unit", [" ", "a<eod> <sep"])
@pytest.mark.parametrize("kind", SMALL)
def test_a_megabyte_takes_seconds(kind: str, unit: str) -> None:
    """Linear work takes a second; quadratic work, at a nanosecond a step, would take a quarter of an hour."""
    text = unit * (2**20 // len(unit))
    started = time.perf_counter()
    ids = SMALL[kind]().encode(text)
    assert time.perf_counter() - started < 60
    assert SMALL[kind]().decode(ids) == text


def test_training_is_deterministic_and_bounded(caplog: pytest.LogCaptureFixture) -> None:
    once, again = (train_bpe(iter(TEXTS), 330) for _ in range(2))
    assert once._to_file() == again._to_file()
    assert not caplog.text
    start = [TEXTS[0], "".join(TEXTS)[len(TEXTS[0]) : 100]]
    assert train_bpe(TEXTS, 330, max_characters=100)._to_file() == train_bpe(start, 330)._to_file()
    assert "trained on the first 100 characters of its texts only" in caplog.text


def test_training_on_texts_without_end() -> None:
    endless = itertools.cycle(TEXTS)
    assert train_bpe(endless, 300, max_characters=1000).vocab_size == 300


def test_too_small_a_vocabulary() -> None:
    with pytest.raises(UsageError, match="vocab_size 261 is below 262: 256 bytes and 6 special tokens"):
        train_bpe(TEXTS, 261)
    assert train_bpe(TEXTS, 262).vocab_size == 262
