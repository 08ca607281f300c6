"""Answers, token by token: what is listed with log-probabilities is the text, and characters across a prompt's end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from small_tokenizers import SMALL, TEXT, bpe
from yuanmoe.engine.requests import RequestOutput
from yuanmoe.serve.core.answer import Answer
from yuanmoe.text.answer_text import AnswerText, unfinished_bytes


@pytest.mark.parametrize("stop", ["beta", "a b", "a beta g", "gamma delta"])
def test_listed_tokens_are_those_of_the_text(stop: str) -> None:
    listed(bpe(), "alpha beta gamma delta", stop, 1)


@given(text=TEXT, stop=st.text(min_size=1, max_size=3), cut=st.integers(1, 5))
def test_listed_tokens_are_those_of_any_text(text: str, stop: str, cut: int) -> None:
    listed(bpe(), text, stop, cut)


def listed(tokenizer, text: str, stop: str, cut: int) -> None:
    """Asserts that tokens and text are equal at the end, and that no token is ahead of its text."""
    ids = tokenizer.encode(text, allow_special=False)
    outputs = [RequestOutput(0, token_id, -1.0) for token_id in ids]
    outputs.append(RequestOutput(0, tokenizer.eod_id, -1.0, finish_reason="stop"))
    answer = Answer(tokenizer, [tokenizer.sep_id], [stop])
    said, tokens = "", b""
    for at in range(0, len(outputs), cut):
        delta = answer.push(outputs[at : at + cut])
        said += delta.text
        tokens += b"".join(token.surface for token in delta.tokens)
        assert said.encode().startswith(tokens) or len(tokens) < len(said.encode()) + 4
    assert said == text.partition(stop)[0]
    assert tokens == said.encode()


@pytest.mark.parametrize("kind", SMALL)
@given(data=st.data())
def test_prompts_that_end_inside_a_character(kind: str, data) -> None:
    """Prompt and answer together are the text, wherever between two tokens the answer begins."""
    tokenizer = SMALL[kind]()
    text = data.draw(TEXT.filter(bool)) + "\U0001f600\u9f98"
    ids = tokenizer.encode(text, allow_special=False)
    place = data.draw(st.integers(1, len(ids)))
    begun, rest = ids[:place], ids[place:]
    answer = AnswerText(tokenizer, begun, ())
    said = "".join(map(answer.push, rest)) + answer.finish()
    prompt = tokenizer.decode(begun)
    if unfinished_bytes(tokenizer, begun):
        prompt = prompt[:-1]
    assert prompt + said == tokenizer.decode(ids)
