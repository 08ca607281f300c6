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
