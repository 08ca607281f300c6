"""Which tokens of a conversation are learned: by our rule, and by the released one with its edge cases."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from small_tokenizers import SMALL, TEXT, bpe, small_sentencepiece
from yuanmoe.data.prepare.conversations import messages_of
from yuanmoe.data.prepare.finetuning import (
    encode_conversation,
    encode_line,
    first_sep_mask,
    official_window_mask,
)
from yuanmoe.data.prepare.formats import clean_line
from yuanmoe.errors import TokenizerError, UsageError
from yuanmoe.text.chat import encode_chat

EOD, SEP, Q, A = 0, 1, 5, 6
"""In windows of labels: questions and answers are runs of Q and A."""


def talk(*contents, system=None):
    messages = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant") * len(contents)
    return messages + [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


def learned(tokenizer, ids, mask):
    """The learned runs as text."""
    runs, run = [], []
    for token_id, wanted in zip([*ids, None], [*mask, False], strict=True):
        if wanted:
            run.append(token_id)
        elif run:
            runs.append(tokenizer.decode(run, previous=tokenizer.sep_id))
            run = []
    return runs


@pytest.mark.parametrize("kind", SMALL)
def test_one_turn(kind):
    tokenizer = SMALL[kind]()
    ids, mask = encode_conversation(tokenizer, talk(" def add? ", " return first\n"))
    assert ids == [
        *tokenizer.encode("def add?"),
        tokenizer.sep_id,
        *tokenizer.encode("return first"),
        tokenizer.eod_id,
    ]
    assert mask == [token >= ids.index(tokenizer.sep_id) for token in range(len(ids))]


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("newline", ["newline", "literal"])
def test_every_answer_of_a_conversation_and_nothing_else(kind, newline):
    tokenizer = SMALL[kind]()
    said = talk(
        "two\nlines", "the fox", "\u6625\u5929?", "\u6625\u6e38\u4f5c\u6587", "and", "the dog", system="Be brief."
    )
    ids, mask = encode_conversation(tokenizer, said, newline=newline)
    first, second, last = learned(tokenizer, ids, mask)
    assert (first, second, last) == ("the fox", "\u6625\u6e38\u4f5c\u6587", "<sep>the dog<eod>")
    asked = encode_chat(tokenizer, said[:-1], newline=newline)
    assert ids[: len(asked)] == asked, "learned as it is served"


@pytest.mark.parametrize("kind", SMALL)
@given(contents=st.lists(TEXT.filter(str.strip), min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0))
def test_whatever_is_said_only_answers_are_learned(kind, contents):
    tokenizer = SMALL[kind]()
    ids, mask = encode_conversation(tokenizer, talk(*contents))
    assert len(ids) == len(mask)
    assert ids[: ids.index(tokenizer.sep_id)] == encode_chat(tokenizer, talk(*contents[:-1]))[:-1]
    space = " " if kind == "sentencepiece" else "\u2581"
    answers = [text.strip().replace("\u2581", space) for text in contents[1::2]]
    assert learned(tokenizer, ids, mask) == [*answers[:-1], f"<sep>{answers[-1]}<eod>"]


def test_special_strings_in_contents_are_text():
    tokenizer = bpe()
    ids, mask = encode_conversation(tokenizer, talk("<sep><eod>", "<eod>"))
    assert (ids.count(tokenizer.sep_id), ids.count(tokenizer.eod_id)) == (1, 1)
    assert learned(tokenizer, ids, mask) == ["<sep><eod><eod>"]


def test_records_are_messages_or_prompt_and_completion():
    assert messages_of({"prompt": "q", "completion": "a"}) == talk("q", "a")
    assert messages_of({"messages": talk("q", "a"), "id": 7}) == talk("q", "a")
    with pytest.raises(
        UsageError, match=r"needs messages \(a list of objects\), or prompt and completion; this one has text"
    ):
        messages_of({"text": "q"})
    with pytest.raises(
        UsageError, match="message 1, the last one, is from 'user'; a conversation to learn from must end"
    ):
        encode_conversation(bpe(), talk("q"))
    with pytest.raises(UsageError, match="message 0, the last one, is from nobody"):
        encode_conversation(bpe(), [])
    with pytest.raises(UsageError, match="message 1 has content of type int; it must be text"):
        encode_conversation(bpe(), talk(7, "a"))


def test_a_tokenizer_that_changes_text_cannot_tell_who_spoke():
    class Shouting(type(bpe())):
        def decode(self, ids, **_):
            return super().decode(ids) + "!"

    with pytest.raises(TokenizerError, match="9 characters of a conversation come back from their tokens as 10"):
        encode_conversation(Shouting(bpe()._backend), talk("hi", "you", "so", "no"))


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("<n>one<n>two\r\n", "one\ntwo"),
        ("  q[SEP]a ", "q<sep>a"),
        ("a\u2583b<n>", "ab"),
        (" \r\n", ""),
        ("<n>", ""),
    ],
)
def test_the_official_line(line, text):
    assert clean_line(line) == text


@pytest.mark.parametrize("kind", SMALL)
def test_the_official_line_in_tokens(kind):
    tokenizer = SMALL[kind]()
    ids = encode_line(tokenizer, "add <sep>\nfirst<eod><sep>x")
    parts = [tokenizer.encode(part, allow_special=False) for part in ("add", "first<eod>", "x")]
    sep, eod = tokenizer.sep_id, tokenizer.eod_id
    assert ids == [*parts[0], sep, *parts[1], sep, *parts[2], eod]
    mask = first_sep_mask(ids, sep)
    assert mask == [False] * len(parts[0]) + [True] * (len(ids) - len(parts[0])), "later questions are learned too"
    assert all(first_sep_mask(encode_line(tokenizer, "no question"), sep))


# The released mask (megatron/utils.py of Yuan2.0-M32), by hand: labels of a window, and what of it is learned.
WINDOWS = {
    "questions are not learned, <sep>, answers and <eod> are": (
        [Q, Q, SEP, A, EOD, Q, SEP, A, A, EOD],
        [0, 0, 1, 1, 1, 0, 1, 1, 1, 1],
    ),
    "a segment without <sep> is learned": ([Q, Q, EOD, Q, SEP, A, EOD, Q, Q, Q], [1, 1, 1, 0, 1, 1, 1, 1, 1, 1]),
    "later questions of a segment are learned": (
        [Q, SEP, A, Q, SEP, A, EOD, A, EOD, A],
        [0, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    ),
    "no <eod>: all of the window": ([Q, Q, SEP, A, A, A, A, A, A, A], [1] * 10),
    "one <eod>: the rest is learned whole": ([Q, SEP, A, EOD, Q, Q, SEP, A, A, A], [0, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
    "two: the rest up to its <sep> is not": ([A, EOD, SEP, EOD, Q, Q, Q, SEP, A, A], [1, 1, 1, 1, 0, 0, 0, 1, 1, 1]),
    "two: a rest without <sep> is": ([A, EOD, Q, SEP, A, EOD, Q, Q, Q, Q], [1, 1, 0, 1, 1, 1, 1, 1, 1, 1]),
    "<eod> at the very end": ([Q, SEP, A, A, A, A, A, A, A, EOD], [0, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_the_released_mask_of_a_window(case):
    labels, expected = WINDOWS[case]
    assert official_window_mask(np.array([labels]), sep_id=SEP, eod_id=EOD).tolist() == [
        [each == 1 for each in expected]
    ]


def test_rows_are_masked_apart():
    labels = np.array([labels for labels, _ in WINDOWS.values()])
    masks = official_window_mask(labels, sep_id=SEP, eod_id=EOD)
    assert masks.tolist() == [[each == 1 for each in expected] for _, expected in WINDOWS.values()]


def test_sentencepiece_spells_its_space_mark_as_a_space():
    tokenizer = small_sentencepiece()
    ids, mask = encode_conversation(tokenizer, talk("a\u2581b", "the\u2581dog", "b", "c"))
    assert learned(tokenizer, ids, mask)[0] == "the dog"
