"""Streams of tokens: whole characters only, the same text as decoding at once, and nothing of a stop string."""

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from small_tokenizers import SMALL, TEXT, bpe, small_sentencepiece
from yuanmoe.errors import TokenizerError, UsageError
from yuanmoe.text.detokenize import StopStrings, StreamingDetokenizer
from yuanmoe.text.tokenizer import Tokenizer, load_tokenizer

RANDOM_IDS = st.lists(st.integers(0, 379), max_size=40)  # byte tokens are most of these


@pytest.fixture(scope="module")
def official(sentencepiece_folder: Path) -> Tokenizer:
    return load_tokenizer(sentencepiece_folder)


def stream(tokenizer: Tokenizer, ids: list[int], **choices) -> list[str]:
    detokenizer = StreamingDetokenizer(tokenizer, **choices)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


@pytest.mark.parametrize("kind", SMALL)
@given(ids=RANDOM_IDS, skip=st.booleans(), previous=st.none() | st.integers(0, 379))
def test_random_ids(kind: str, ids: list[int], skip: bool, previous: int | None) -> None:
    tokenizer = SMALL[kind]()
    pieces = stream(tokenizer, ids, skip_special=skip, previous=previous)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special=skip, previous=previous)


@pytest.mark.parametrize("kind", SMALL)
@given(text=TEXT)
def test_text(kind: str, text: str) -> None:
    """Whole characters of a text arrive as soon as their last byte does, and U+FFFD only where the text has it."""
    tokenizer = SMALL[kind]()
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, ids)
    expected = text.replace("\u2581", " ") if kind == "sentencepiece" else text
    assert "".join(pieces) == expected
    assert pieces[-1] == ""
    so_far = ""
    for count, piece in enumerate(pieces[:-1], start=1):
        so_far += piece
        assert so_far == expected[: len(so_far)]
        assert so_far == tokenizer.decode(ids[:count])[: len(so_far)]


@given(places=st.lists(st.integers(0, 134959) | st.integers(3, 258), max_size=30), skip=st.booleans())
def test_official(official: Tokenizer, places: list[int], skip: bool) -> None:
    ids = [place % official.vocab_size for place in places]
    assert "".join(stream(official, ids, skip_special=skip)) == official.decode(ids, skip_special=skip)


def test_an_emoji_arrives_whole() -> None:
    tokenizer = small_sentencepiece()
    ids = tokenizer.encode("\U0001f600!")
    assert [piece for piece in stream(tokenizer, ids) if piece] == ["\U0001f600", "!"]


def test_an_unfinished_character_is_replaced_when_it_ends() -> None:
    tokenizer = bpe()
    half = tokenizer.encode("\U0001f600")[:2]
    assert stream(tokenizer, half) == ["", "", "\ufffd"]
    assert stream(tokenizer, [*half, tokenizer.eod_id]) == ["", "", "\ufffd<eod>", ""]


@pytest.mark.parametrize("previous", [-1, 10**9])
def test_ids_that_are_none(previous: int) -> None:
    detokenizer = StreamingDetokenizer(bpe())
    with pytest.raises(TokenizerError, match=rf"token id {previous} is outside 0..399 of the tokenizer"):
        detokenizer.push(previous)


STOPS = st.lists(st.text("ab", min_size=1, max_size=7), max_size=4)


@settings(max_examples=400)
@given(stops=STOPS, pieces=st.lists(st.text("ab", max_size=5), max_size=8))
@example(stops=["aaabb"], pieces=["aaab", "a"])  # two steps back while the automaton is made
def test_stop_strings_against_a_naive_search(stops: list[str], pieces: list[str]) -> None:
    text = "".join(pieces)
    found = [(end, stop) for end in range(len(text) + 1) for stop in stops if text[:end].endswith(stop)]
    first_end = min((end for end, _ in found), default=None)
    stop = max((stop for end, stop in found if end == first_end), key=len, default=None)
    expected = text if stop is None else text[: first_end - len(stop)]

    matcher = StopStrings(stops)
    let_through = ""
    for count, piece in enumerate(pieces, start=1):
        let_through += matcher.push(piece)
        seen = "".join(pieces[:count])
        if matcher.matched is None:
            assert let_through + held_back(seen, stops) == seen
    assert matcher.matched == stop
    assert let_through + matcher.flush() == expected
    assert matcher.flush() == ""


def held_back(text: str, stops: list[str]) -> str:
    """The longest end of the text that starts a stop string: no less, and no more, is to be held."""
    ends = (text[len(text) - size :] for size in range(len(text), 0, -1))
    return next((end for end in ends if any(stop.startswith(end) for stop in stops)), "")


def test_stop_strings_overlap() -> None:
    matcher = StopStrings(["aab", "\n\n", "Question:"])
    assert [matcher.push(piece) for piece in ("xaa", "a", "b", "more")] == ["x", "a", "", ""]
    assert (matcher.matched, matcher.flush()) == ("aab", "")


@pytest.mark.parametrize("stops", [["ab", "b"], ["b", "ab"]])
def test_the_longest_of_the_stop_strings_that_end_together(stops: list[str]) -> None:
    matcher = StopStrings(stops)
    assert (matcher.push("xa"), matcher.push("b"), matcher.matched) == ("x", "", "ab")


def test_a_stop_string_that_never_comes_is_given_back() -> None:
    matcher = StopStrings(["<sep>"])
    assert [matcher.push("a <s"), matcher.push("ep"), matcher.flush()] == ["a ", "", "<sep"]


def test_no_stop_strings_hold_nothing() -> None:
    assert StopStrings([]).push("abc") == "abc"


def test_an_empty_stop_string() -> None:
    with pytest.raises(UsageError, match="stop string 1 is empty"):
        StopStrings(["x", ""])
