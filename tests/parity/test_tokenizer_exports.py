"""Our saved tokenizers in the hands of transformers: the same ids, the same conversations."""

from pathlib import Path

import pytest
from hypothesis import given

from small_tokenizers import TEXT, bpe, small_sentencepiece
from yuanmoe.text.chat import encode_chat, render_chat

transformers = pytest.importorskip("transformers", reason="transformers (the hf extra) is not installed")

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " 春天 "},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "q2"},
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp("exported")
    bpe().save(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


@given(text=TEXT)
def test_same_ids(exported, text: str) -> None:
    ids = bpe().encode(text)
    assert exported(text)["input_ids"] == ids
    assert exported.decode(ids) == text


@pytest.mark.parametrize("whitespace", ["strip", "keep"])
def test_sentencepiece_with_its_special_tokens(tmp_path_factory, whitespace) -> None:
    """transformers' own way to use such a file, with the special tokens that we saved beside it."""
    folder = tmp_path_factory.mktemp(whitespace)
    ours = small_sentencepiece(whitespace)
    ours.save(folder)
    theirs = transformers.SentencePieceBackend.from_pretrained(folder)

    @given(text=TEXT)
    def same(text: str) -> None:
        assert theirs(text)["input_ids"] == ours.encode(text)

    same()
    assert len(theirs) == ours.vocab_size
    assert theirs.get_added_vocab() == ours.special_tokens


def test_same_conversation(exported) -> None:
    assert exported.apply_chat_template(MESSAGES, tokenize=False) == render_chat(MESSAGES)
    assert exported.apply_chat_template(MESSAGES, return_dict=False) == encode_chat(bpe(), MESSAGES)
    assert (exported.eos_token_id, exported.pad_token_id, exported.bos_token) == (0, 2, None)


CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Jinan"}'}}
CONVERSATIONS = {
    "parts": [{"role": "user", "content": [{"type": "text", "text": " h"}, {"type": "text", "text": "i "}]}],
    "developer": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "hi"}],
    "null": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "q2"},
    ],
    "tool": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "rain"}]},
    ],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_as_clients_write_them(exported, name) -> None:
    messages = CONVERSATIONS[name]
    assert exported.apply_chat_template(messages, tokenize=False) == render_chat(messages)
    assert exported.apply_chat_template(messages, return_dict=False) == encode_chat(bpe(), messages)


@pytest.mark.parametrize("arguments", ['{"city": "Jinan"}', {"city": "Jinan"}])
def test_calls_of_tools_are_the_text_that_the_server_makes_of_them(exported, arguments) -> None:
    from yuanmoe.serve.openai.tools import CLOSE, OPEN, RESULT

    call = {**CALL, "function": {"name": "weather", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "Let me look.", "tool_calls": [call, call]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    called = f'{OPEN}{{"name": "weather", "arguments": {{"city": "Jinan"}}}}{CLOSE}'
    expected = f"q\nLet me look.\n{called}\n{called}\n{RESULT.format('rain')}<sep>"
    assert exported.apply_chat_template(messages, tokenize=False) == expected


def test_batches_are_padded_on_the_left_so_that_generate_continues_them(exported) -> None:
    batch = exported(["def f():", "a longer text than the other"], padding=True)
    assert batch["attention_mask"][0][0] == 0
    assert batch["attention_mask"][0][-1] == 1
    assert batch["input_ids"][0][0] == exported.pad_token_id


def test_pictures_in_a_message_are_refused(exported) -> None:
    part = {"type": "image_url", "image_url": {"url": "x"}}
    with pytest.raises(Exception, match="only parts of type text can be read"):
        exported.apply_chat_template([{"role": "user", "content": [part]}], tokenize=False)
