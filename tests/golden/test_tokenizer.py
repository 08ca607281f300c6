"""Ids of the released tokenizer, as transformers 4.30.2 ("strip") and 4.44.2 ("keep") give them, and our BPE's."""

from pathlib import Path

import pytest

from small_tokenizers import TEXTS
from yuanmoe.errors import UsageError
from yuanmoe.text.bpe import train_bpe
from yuanmoe.text.sentencepiece_tokenizer import SentencePieceTokenizer, unescape_newlines
from yuanmoe.text.tokenizer import Tokenizer, load_tokenizer

FENCE = "`" * 3

SPECIAL_IDS = {
    "<unk>": 0,
    "<s>": 1,
    "<eod>": 77185,
    "<sep>": 77187,
    "<pad>": 77188,
    "<mask>": 134953,
    "<predict>": 134954,
    "<FIM_SUFFIX>": 134955,
    "<FIM_PREFIX>": 134956,
    "<FIM_MIDDLE>": 134957,
    "<commit_before>": 96635,
    "<commit_msg>": 96636,
    "<commit_after>": 96637,
    "<jupyter_start>": 96630,
    "<jupyter_text>": 96631,
    "<jupyter_code>": 96632,
    "<jupyter_output>": 96633,
    "<empty_output>": 96634,
    "<repo_name>": 134958,
    "<file_sep>": 134959,
}

BOTH = {
    "写一篇春游作文": [29871, 31479, 37056, 31031, 32419, 39053],
    "写一篇春游作文<sep>": [29871, 31479, 37056, 31031, 32419, 39053, 77187],
    "<sep>春天": [77187, 29871, 36801],
    "a<eod>b": [263, 77185, 289],
    "a<sep>b": [263, 77187, 289],
    "12345": [29871, 29896, 29906, 29941, 29946, 29945],
    "Question:1+1=?<sep>": [894, 29901, 29896, 29974, 29896, 115798, 77187],
    "<FIM_PREFIX>abc<FIM_SUFFIX>def<FIM_MIDDLE>": [134956, 25638, 134955, 822, 134957],
    "你好<n>世界": [29871, 38190, 29966, 29876, 29958, 32138],
    "def f():\n    return 1\n": [822, 285, 7295, 13, 1678, 736, 29871, 29896, 13],
    "\U0001f600": [29871, 243, 162, 155, 131],
    "": [],
    " ": [259],
    "\t": [29871, 12],
    "\0a\0": [29871, 3, 29874, 3],
    "<0x41>": [529, 29900, 29916, 29946, 29896, 29958],
    "<eod><eod>": [77185, 77185],
    "a <n> b": [263, 529, 29876, 29958, 289],
    # Not "added" tokens, so neither version drops whitespace around them; `</s>` is no special string at all.
    "x \n<eod> \ny": [921, 29871, 13, 77185, 259, 13, 29891],
    "a <s> b": [263, 29871, 1, 29871, 289],
    "a <unk> b": [263, 29871, 0, 29871, 289],
    "a </s> b": [263, 1533, 29879, 29958, 289],
    "a <|endoftext|> b": [263, 29871, 86099, 2765, 118504, 79750, 289],
}

STRIP = {
    f"x<sep>\n{FENCE}python\n": [921, 77187, 7521, 4691, 13],
    "x\n<sep>y": [921, 77187, 343],
    "A <sep> B": [319, 77187, 350],
    "a <sep> <sep> b": [263, 77187, 77187, 289],
    " <sep> ": [77187],
    "a<eod> <sep> b": [263, 77185, 77187, 289],
    "\u3000<sep>\u00a0b": [77187, 289],
    "a <mask> b": [263, 134953, 289],
    "<commit_before> x <commit_msg> y": [96635, 921, 96636, 343],
}

KEEP = {
    f"x<sep>\n{FENCE}python\n": [921, 77187, 29871, 13, 28956, 4691, 13],
    "x\n<sep>y": [921, 13, 77187, 343],
    "A <sep> B": [319, 29871, 77187, 29871, 350],
    "a <sep> <sep> b": [263, 29871, 77187, 259, 77187, 29871, 289],
    " <sep> ": [259, 77187, 259],
    "a<eod> <sep> b": [263, 77185, 259, 77187, 29871, 289],
    "\u3000<sep>\u00a0b": [29871, 30358, 77187, 20246, 29890],
    "a <mask> b": [263, 29871, 134953, 29871, 289],
    "<commit_before> x <commit_msg> y": [96635, 29871, 921, 29871, 96636, 29871, 343],
}

PLAIN = {"a<sep>b": [263, 29966, 19570, 29958, 29890], "<eod>": [529, 80687, 29881, 29958]}


@pytest.fixture(scope="module")
def strip(shared_dir: Path) -> Tokenizer:
    return load_tokenizer(shared_dir / "tokenizer")


@pytest.fixture(scope="module")
def keep(shared_dir: Path) -> Tokenizer:
    return load_tokenizer(shared_dir / "tokenizer" / "tokenizer.model", whitespace="keep")


def test_special_ids(strip: Tokenizer) -> None:
    assert isinstance(strip, SentencePieceTokenizer)
    assert strip.is_official
    assert strip.special_tokens == SPECIAL_IDS
    assert list(strip.special_tokens) == list(SPECIAL_IDS)
    assert (strip.eod_id, strip.sep_id, strip.pad_id) == (77185, 77187, 77188)
    assert strip.vocab_size == 134960


@pytest.mark.parametrize(("text", "ids"), (BOTH | STRIP).items())
def test_authors_whitespace(strip: Tokenizer, text: str, ids: list[int]) -> None:
    assert strip.encode(text) == ids


@pytest.mark.parametrize(("text", "ids"), (BOTH | KEEP).items())
def test_kept_whitespace(keep: Tokenizer, text: str, ids: list[int]) -> None:
    assert keep.encode(text) == ids
    assert keep.decode(ids) == text


@pytest.mark.parametrize(("text", "ids"), PLAIN.items())
def test_special_strings_as_plain_text(strip: Tokenizer, text: str, ids: list[int]) -> None:
    assert strip.encode(text, allow_special=False) == ids
    assert strip.decode(ids) == text


def test_no_special_piece_can_be_merged_from_plain_text(strip: Tokenizer) -> None:
    """A merge joins two pieces: none of the special strings is two pieces of the vocabulary in a row."""
    assert isinstance(strip, SentencePieceTokenizer)
    pieces = {strip.token_bytes(token_id) for token_id in range(3 + 256, 134953)}
    for text in map(str.encode, SPECIAL_IDS):
        assert not any({text[:cut], text[cut:]} <= pieces for cut in range(1, len(text)))


def test_newline_escape(strip: Tokenizer) -> None:
    assert strip.encode("a\nb") == [263, 13, 29890]
    assert strip.encode(unescape_newlines("a<n>b")) == [263, 13, 29890]


def test_fill_in_the_middle(strip: Tokenizer) -> None:
    assert strip.fim("abc", "def") == [134956, 25638, 134955, 822, 134957]
    assert strip.fim("abc", "def", "spm") == [134956, 134955, 822, 134957, 25638]
    assert strip.fim("", "x\n", "psm") == [134956, 134955, 921, 13, 134957]
    assert 77185 not in strip.fim("<eod>", "<eod>")
    with pytest.raises(UsageError, match=r"FIM mode is 'msp'; it must be 'psm' \(prefix first\) or 'spm'"):
        strip.fim("a", "b", "msp")  # type: ignore[arg-type]


def test_decoding_an_answer(strip: Tokenizer) -> None:
    """The space that marks a segment is none of the answer's, unless the answer goes on in the prompt's segment."""
    answer = strip.encode("B c")
    assert strip.decode(answer, previous=strip.sep_id) == "B c"
    assert strip.decode(answer, previous=strip.encode("A")[-1]) == " B c"
    assert strip.decode([77187, *answer, 77185]) == "<sep>B c<eod>"
    assert strip.decode([77187, *answer, 77185], skip_special=True) == "B c"


def test_broken_characters(strip: Tokenizer) -> None:
    """Three of the four bytes of an emoji, alone, before a letter and before a special token."""
    assert strip.decode([29871, 243, 162, 155]) == "\ufffd"
    assert strip.decode([243, 162, 155, 29874]) == "\ufffda"
    assert strip.decode([243, 162, 155, 77187]) == "\ufffd<sep>"


def test_one_token(strip: Tokenizer) -> None:
    assert [strip.token_text(token_id) for token_id in (822, 13, 243, 31479, 77187)] == [
        " def",
        "\n",
        "<0xF0>",
        "写",
        "<sep>",
    ]
    assert strip.token_bytes(243) == b"\xf0"


def test_byte_level_bpe() -> None:
    tokenizer = train_bpe(TEXTS, 320)
    special_tokens = ("<eod>", "<sep>", "<pad>", "<FIM_PREFIX>", "<FIM_SUFFIX>", "<FIM_MIDDLE>")
    assert tokenizer.special_tokens == {text: token_id for token_id, text in enumerate(special_tokens)}
    assert tokenizer.vocab_size == 320
    ids = tokenizer.encode("def se(self, n12):\n        return<eod>春")
    assert ids == [318, 268, 13, 263, 272, 17, 226, 83, 22, 23, 269, 301, 295, 74, 89, 90, 87, 83, 0, 278]
    tokens = ["def", " se", "(", "se", "lf", ",", " ", "n", "1", "2", "):", "\n       ", " r", *"eturn", "<eod>", "春"]
    assert [tokenizer.token_text(token_id) for token_id in ids] == tokens
    assert tokenizer.token_text(274) == "<0xE6><0x98>"
    assert tokenizer.fim("x", "y") == [3, 93, 4, 94, 5]
    assert tokenizer.fim("x", "y", "spm") == [3, 4, 94, 5, 93]
