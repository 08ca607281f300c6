"""Ids of the released tokenizer, as transformers 4.30.2 ("strip") and 4.44.2 ("keep") give them, of a small file of
its kind, and of our BPE."""

from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor

from golden_data.drawn import DATA
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


SMALL_SPECIAL_IDS = dict(
    zip(
        SPECIAL_IDS,
        [0, 1, *range(380, 383), *range(391, 396), *range(388, 391), *range(383, 388), 396, 397],
        strict=True,
    )
)
"""Of the small file: the same tokens are its pieces, the others follow its last one."""

SMALL = {
    "写一篇春游作文<sep>": [324, 373, 323, 288, 372, 377, 381],
    "12345": [324, 360, 361, 54, 55, 56],
    "def f():\n    return 1\n": [268, 277, 269, 338, 270, 260, 327, 306, 335, 313, 324, 360, 336],
    "\U0001f600": [324, 243, 162, 155, 131],
    "a </s> b<eod>": [324, 343, 324, 63, 50, 328, 65, 324, 344, 380],
    "a<n>b": [324, 343, 63, 326, 65, 344],
    "\0a\0": [324, 3, 343, 3],
}

PARTS = {
    f"x<sep>\n{FENCE}python\n": (["x", "<sep>", f"{FENCE}python\n"], ["x", "<sep>", f"\n{FENCE}python\n"]),
    "x\n<sep>y": (["x", "<sep>", "y"], ["x\n", "<sep>", "y"]),
    "A <sep> B": (["A", "<sep>", "B"], ["A ", "<sep>", " B"]),
    "a <sep> <sep> b": (["a", "<sep>", "<sep>", "b"], ["a ", "<sep>", " ", "<sep>", " b"]),
    " <sep> ": (["<sep>"], [" ", "<sep>", " "]),
    "a<eod> <sep> b": (["a", "<eod>", "<sep>", "b"], ["a", "<eod>", " ", "<sep>", " b"]),
    "\u3000<sep>\u00a0b": (["<sep>", "b"], ["\u3000", "<sep>", "\u00a0b"]),
    "a <mask> b": (["a", "<mask>", "b"], ["a ", "<mask>", " b"]),
    "<commit_before> x <commit_msg> y": (
        ["<commit_before>", "x", "<commit_msg>", "y"],
        ["<commit_before>", " x ", "<commit_msg>", " y"],
    ),
    # Whitespace beside what is not an "added" token stays, and `</s>` is not a special string.
    "x \n<eod> \ny": (["x \n", "<eod>", " \ny"],) * 2,
    "a <s> b": (["a ", "<s>", " b"],) * 2,
    "a <unk> b": (["a ", "<unk>", " b"],) * 2,
    "a </s> b": (["a </s> b"],) * 2,
    "<FIM_PREFIX>abc<FIM_SUFFIX>def<FIM_MIDDLE>": (["<FIM_PREFIX>", "abc", "<FIM_SUFFIX>", "def", "<FIM_MIDDLE>"],) * 2,
}
"""Where the authors' transformers ("strip") and the later one ("keep") cut a text; each part is tokenized alone."""


@pytest.fixture(scope="module")
def strip(sentencepiece_folder: Path) -> SentencePieceTokenizer:
    return opened(sentencepiece_folder)


@pytest.fixture(scope="module")
def keep(sentencepiece_folder: Path) -> SentencePieceTokenizer:
    return opened(sentencepiece_folder / "tokenizer.model", whitespace="keep")


def opened(path: Path, **options) -> SentencePieceTokenizer:
    tokenizer = load_tokenizer(path, **options)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    return tokenizer


def ids_of(tokenizer: Tokenizer, texts: Iterable[str], **options) -> dict[str, list[int]]:
    return {text: tokenizer.encode(text, **options) for text in texts}


def test_released_ids(released_tokenizer: Path) -> None:
    strip, keep = opened(released_tokenizer), opened(released_tokenizer, whitespace="keep")
    assert strip.is_official
    assert ids_of(strip, BOTH | STRIP) == BOTH | STRIP
    assert ids_of(keep, BOTH | KEEP) == BOTH | KEEP
    assert ids_of(strip, PLAIN, allow_special=False) == PLAIN
    assert strip.fim("abc", "def") == [134956, 25638, 134955, 822, 134957]
    assert strip.encode("a\nb") == strip.encode(unescape_newlines("a<n>b")) == [263, 13, 29890]
    tokens = {822: " def", 13: "\n", 243: "<0xF0>", 31479: "写", 77187: "<sep>"}
    assert {token_id: strip.token_text(token_id) for token_id in tokens} == tokens


def test_ids_of_the_small_file() -> None:
    tokenizer = opened(DATA / "tokenizer")
    assert ids_of(tokenizer, SMALL) == SMALL
    tokens = {268: " d", 336: "\n", 243: "<0xF0>", 323: "一篇", 381: "<sep>"}
    assert {token_id: tokenizer.token_text(token_id) for token_id in tokens} == tokens
    assert tokenizer.token_bytes(243) == b"\xf0"


def test_special_ids(strip: SentencePieceTokenizer) -> None:
    expected, size = (SPECIAL_IDS, 134960) if strip.is_official else (SMALL_SPECIAL_IDS, 398)
    assert strip.special_tokens == expected
    assert list(strip.special_tokens) == list(SPECIAL_IDS)
    assert (strip.eod_id, strip.sep_id, strip.pad_id) == tuple(expected[text] for text in ("<eod>", "<sep>", "<pad>"))
    assert strip.vocab_size == size


@pytest.mark.parametrize("text", PARTS)
def test_where_a_text_is_cut(sentencepiece_folder: Path, strip: Tokenizer, keep: Tokenizer, text: str) -> None:
    library = SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    for tokenizer, parts in zip((strip, keep), PARTS[text], strict=True):
        special = tokenizer.special_tokens
        expected = [[special[part]] if part in special else library.encode(part) for part in parts]
        assert tokenizer.encode(text) == list(chain.from_iterable(expected))


@pytest.mark.parametrize("text", BOTH | KEEP)
def test_nothing_is_lost_where_whitespace_is_kept(keep: Tokenizer, text: str) -> None:
    assert keep.decode(keep.encode(text)) == text


@pytest.mark.parametrize("text", PLAIN)
def test_special_strings_as_plain_text(strip: Tokenizer, text: str) -> None:
    ids = strip.encode(text, allow_special=False)
    assert not set(strip.special_tokens.values()) & set(ids)
    assert strip.decode(ids) == text


def test_no_special_piece_can_be_merged_from_plain_text(strip: Tokenizer) -> None:
    """A merge joins two pieces: none of the special strings is two pieces of the vocabulary in a row."""
    special = set(strip.special_tokens.values())
    ordinary = [token_id for token_id in range(3 + 256, strip.vocab_size) if token_id not in special]
    pieces = {strip.token_bytes(token_id) for token_id in ordinary}
    for text in map(str.encode, SPECIAL_IDS):
        assert not any({text[:cut], text[cut:]} <= pieces for cut in range(1, len(text)))


def test_newline_escape(strip: Tokenizer) -> None:
    assert strip.encode(unescape_newlines("a<n>b")) == strip.encode("a\nb") != strip.encode("a<n>b")


def test_fill_in_the_middle(strip: Tokenizer) -> None:
    prefix, suffix, middle = (strip.special_tokens[f"<FIM_{name}>"] for name in ("PREFIX", "SUFFIX", "MIDDLE"))
    before, after = strip.encode("abc"), strip.encode("def")
    assert strip.fim("abc", "def") == [prefix, *before, suffix, *after, middle]
    assert strip.fim("abc", "def", "spm") == [prefix, suffix, *after, middle, *before]
    assert strip.fim("", "x\n", "psm") == [prefix, suffix, *strip.encode("x\n"), middle]
    assert strip.eod_id not in strip.fim("<eod>", "<eod>")
    with pytest.raises(UsageError, match=r"FIM mode is 'msp'; it must be 'psm' \(prefix first\) or 'spm'"):
        strip.fim("a", "b", "msp")  # type: ignore[arg-type]


def test_decoding_an_answer(strip: Tokenizer) -> None:
    """The space that marks a segment is none of the answer's, unless the answer goes on in the prompt's segment."""
    answer = strip.encode("B c")
    assert strip.decode(answer, previous=strip.sep_id) == "B c"
    assert strip.decode(answer, previous=strip.encode("A")[-1]) == " B c"
    assert strip.decode([strip.sep_id, *answer, strip.eod_id]) == "<sep>B c<eod>"
    assert strip.decode([strip.sep_id, *answer, strip.eod_id], skip_special=True) == "B c"


def test_broken_characters(strip: Tokenizer) -> None:
    """Three of the four bytes of an emoji, alone, before a letter and before a special token."""
    mark, *first_three, _ = strip.encode("\U0001f600")
    letter = strip.encode("!a")[-1]
    assert strip.decode([mark, *first_three]) == "\ufffd"
    assert strip.decode([*first_three, letter]) == "\ufffda"
    assert strip.decode([*first_three, strip.sep_id]) == "\ufffd<sep>"


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
