"""Conversations as people write them for `model.chat`: text parts, the developer's role, and what is none."""

import pytest

from small_lm import small_lm
from yuanmoe.errors import UsageError
from yuanmoe.text.chat import render_chat


def test_parts_and_the_developer_s_role_are_those_of_plain_messages() -> None:
    plain = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi you"}]
    parts = [
        {"role": "developer", "content": [{"type": "text", "text": "be brief"}]},
        {"role": "user", "content": [{"type": "text", "text": "hi "}, {"type": "text", "text": "you"}]},
    ]
    assert render_chat(parts) == render_chat(plain)


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ("hi", "a conversation is a list of messages"),
        (["hi"], "message 1 is a str"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "message 1 has a part that is no text"),
        ([{"role": "user", "content": None}], "has 0 characters; the last message must be from 'user'"),
        ([{"role": ["user"], "content": "a"}], "message 1 has the role"),
    ],
)
def test_what_is_no_conversation_is_said_in_words(messages, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        render_chat(messages)


def test_one_stop_string_needs_no_list() -> None:
    lm = small_lm()
    whole = lm.generate("def add(", max_new_tokens=12).text
    stop = whole[3:5]
    one, listed = (lm.generate("def add(", max_new_tokens=12, stop=given) for given in (stop, [stop]))
    assert one.text == listed.text == whole[: whole.index(stop)]
    assert lm.generate("def add(", max_new_tokens=2, stop="\n").ids
