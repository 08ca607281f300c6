"""Conversations as text and as ids, the Jinja template against our own rendering, and what cannot be answered."""

from pathlib import Path

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from small_tokenizers import TEXT, bpe, small_sentencepiece
from yuanmoe.errors import UsageError
from yuanmoe.text.chat import encode_chat, render_chat
from yuanmoe.text.chat_template import Newline, chat_template
from yuanmoe.text.sentencepiece_tokenizer import SPACE_MARK
from yuanmoe.text.tokenizer import load_tokenizer


def said(*turns: str) -> list[dict[str, str]]:
    """Messages from `user: text` and the like."""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


QUESTION = said("user:  写一篇春游作文\n")
TURNS = said("system: Be brief. ", "user: q1 ", "assistant:  a1\n", "user: q2")


@pytest.mark.parametrize(
    ("messages", "newline", "text"),
    [
        (QUESTION, "newline", "写一篇春游作文<sep>"),
        (QUESTION, "literal", "写一篇春游作文<sep>"),
        (TURNS, "newline", "Be brief. \nq1\na1\nq2<sep>"),
        (TURNS, "literal", "Be brief. \nq1<n>a1<n>q2<sep>"),
    ],
)
def test_text(messages: list[dict[str, str]], newline: Newline, text: str) -> None:
    assert render_chat(messages, newline=newline) == text


IDS = {
    "small": ([324, 373, 323, 288, 372, 377, 381], [324, 343, 336, 344, 336, 345, 381]),
    "released": ([29871, 31479, 37056, 31031, 32419, 39053, 77187], [263, 13, 29890, 13, 29883, 77187]),
}
"""Of a question and of three turns, by tokenizer."""


def test_ids(sentencepiece_folder: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_folder)
    question, conversation = IDS["released" if tokenizer.vocab_size == 134960 else "small"]
    assert encode_chat(tokenizer, QUESTION) == question
    turns = said("user: a", "assistant: b", "user: c")
    assert encode_chat(tokenizer, turns) == conversation
    assert encode_chat(tokenizer, turns, newline="literal") == tokenizer.encode("a<n>b<n>c<sep>")


CONVERSATION = st.tuples(
    st.lists(st.fixed_dictionaries({"role": st.sampled_from(("system", "user", "assistant")), "content": TEXT})),
    TEXT.filter(str.strip),
).map(lambda parts: [*parts[0], {"role": "user", "content": parts[1]}])


@given(messages=CONVERSATION, newline=st.sampled_from(("newline", "literal")))
def test_template_is_equal(messages: list[dict[str, str]], newline: Newline) -> None:
    """Rendered as transformers does it: both whitespace options of Jinja on."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    assert environment.from_string(chat_template(newline)).render(messages=messages) == render_chat(
        messages, newline=newline
    )


@given(messages=CONVERSATION, newline=st.sampled_from(("newline", "literal")))
def test_contents_hold_no_special_tokens(messages: list[dict[str, str]], newline: Newline) -> None:
    for tokenizer in (bpe(), small_sentencepiece()):
        ids = encode_chat(tokenizer, messages, newline=newline)
        assert not set(tokenizer.special_tokens.values()) & set(ids[:-1])
        assert ids[-1] == tokenizer.sep_id
        text = render_chat(messages, newline=newline)
        assert tokenizer.decode(ids).replace(SPACE_MARK, " ") == text.replace(SPACE_MARK, " ")


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "the conversation has 0 messages; it needs at least 1"),
        (
            said("user: q", "assistant: a"),
            "message 2, the last one, is from 'assistant' and has 1 characters; .* 'user'",
        ),
        (said("user: q", "user:  \n"), "message 2, the last one, is from 'user' and has 0 characters; .* hold text"),
        (
            said("user: q", "robot: t", "user: q"),
            "message 2 has the role 'robot'; it must be one of system, user, assi",
        ),
        ([{"content": "q"}], "message 1 has the role None"),
        ([{"role": "user", "content": ["q"]}], "message 1 has a part that is no text; parts are"),
        ([{"role": "user", "content": 3}], "message 1 has content of type int; it must be text"),
        ("hi", "a conversation is a list of messages"),
        (["hi"], "message 1 is a str; it must be a dict with role and content"),
    ],
)
def test_what_cannot_be_answered(messages: list[dict[str, str]], complaint: str) -> None:
    for use in (render_chat, lambda messages: encode_chat(bpe(), messages)):
        with pytest.raises(UsageError, match=complaint):
            use(messages)


def test_unknown_newline() -> None:
    with pytest.raises(UsageError, match="newline is 'crlf'; it must be one of newline, literal"):
        render_chat(QUESTION, newline="crlf")  # type: ignore[arg-type]


def test_template_refuses_unknown_roles() -> None:
    """With the function that transformers gives its templates."""

    def raise_exception(message: str) -> None:
        raise ValueError(message)

    with pytest.raises(ValueError, match="unknown role robot"):
        jinja2.Template(chat_template()).render(messages=said("robot: t"), raise_exception=raise_exception)
