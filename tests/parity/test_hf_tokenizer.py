"""AutoTokenizer on official directories and on our own: our tokenizer's ids and texts, whatever the files ask for."""

import json
import pickle
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the extra `hf` is not installed")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoint_writers import official_json, official_state, random_state, write_safetensors
from small_models import small_config
from small_tokenizers import TEXT, bpe, sentencepiece_model, small_sentencepiece
from yuanmoe.errors import TokenizerError, UsageError
from yuanmoe.hosts.hf import YuanTokenizer
from yuanmoe.text.chat import render_chat
from yuanmoe.text.sentencepiece_tokenizer import SentencePieceTokenizer
from yuanmoe.text.tokenizer import load_tokenizer

load = AutoTokenizer.from_pretrained
CONFIG = small_config(vocab_size=512, eod_token_id=380, sep_token_id=381, pad_token_id=382)
FENCE = "`" * 3

# spec 4, the ids of the authors' transformers
PUBLISHED = {
    "写一篇春游作文": [29871, 31479, 37056, 31031, 32419, 39053],
    "写一篇春游作文<sep>": [29871, 31479, 37056, 31031, 32419, 39053, 77187],
    f"x<sep>\n{FENCE}python\n": [921, 77187, 7521, 4691, 13],
    "x\n<sep>y": [921, 77187, 343],
    "A <sep> B": [319, 77187, 350],
    "12345": [29871, 29896, 29906, 29941, 29946, 29945],
    "Question:1+1=?<sep>": [894, 29901, 29896, 29974, 29896, 115798, 77187],
    "<FIM_PREFIX>abc<FIM_SUFFIX>def<FIM_MIDDLE>": [134956, 25638, 134955, 822, 134957],
    "你好<n>世界": [29871, 38190, 29966, 29876, 29958, 32138],
    "def f():\n    return 1\n": [822, 285, 7295, 13, 1678, 736, 29871, 29896, 13],
    "\U0001f600": [29871, 243, 162, 155, 131],
    "a </s> b<eod>": [263, 1533, 29879, 29958, 289, 77185],
}


def token(content: str) -> dict:
    return {"__type": "AddedToken", "content": content, "lstrip": False, "normalized": True, "rstrip": False}


RELEASED = {
    "add_bos_token": True,
    "add_eos_token": True,
    "bos_token": token("<s>"),
    "eos_token": token("</s>"),
    "unk_token": token("<unk>"),
    "pad_token": None,
    "sp_model_kwargs": {},
    "tokenizer_class": "YuanTokenizer",
}


def write_official(folder: Path, model: bytes, **changes) -> Path:
    """Everything of a released directory that concerns the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "config.json").write_text(json.dumps(official_json(CONFIG)))
    (folder / "tokenizer_config.json").write_text(json.dumps(RELEASED | changes))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


@pytest.fixture(scope="module")
def native(sentencepiece_folder):
    return load_tokenizer(sentencepiece_folder)


@pytest.fixture(scope="module")
def official(sentencepiece_folder, tmp_path_factory):
    model = (sentencepiece_folder / "tokenizer.model").read_bytes()
    return load(write_official(tmp_path_factory.mktemp("official"), model))


# --- files as released ------------------------------------------------------------------------------------------------


def test_published_ids(released_tokenizer, tmp_path):
    official = load(write_official(tmp_path, (released_tokenizer / "tokenizer.model").read_bytes()))
    assert {text: official(text)["input_ids"] for text in PUBLISHED} == PUBLISHED
    assert (official.eos_token_id, official.pad_token_id, len(official)) == (77185, 77188, 134960)


def test_official_special_tokens(official, native):
    assert type(official) is YuanTokenizer
    assert official.get_added_vocab() == native.special_tokens
    assert len(official) == native.vocab_size
    assert (official.eos_token_id, official.pad_token_id, official.bos_token_id) == (native.eod_id, native.pad_id, 1)
    assert set(official.all_special_ids) == set(native.special_tokens.values())


@settings(max_examples=60)
@given(text=TEXT)
def test_official_ids_and_texts(official, native, text):
    ids = native.encode(text)
    assert official(text)["input_ids"] == official.encode(text) == ids
    assert official.decode(ids) == native.decode(ids)
    assert official.decode(ids, skip_special_tokens=True) == native.decode(ids, skip_special=True)
    assert official(text, split_special_tokens=True)["input_ids"] == native.encode(text, allow_special=False)


@settings(max_examples=60)
@given(places=st.lists(st.integers(0, 134959) | st.sampled_from([0, 1, 2, 13, 230, 29871, 77185, 77187, 134957])))
def test_official_texts_of_any_ids(official, native, places):
    ids = [place % native.vocab_size for place in places]
    assert official.decode(ids) == native.decode(ids)
    assert official.convert_tokens_to_string(official.convert_ids_to_tokens(ids)) == native.decode(ids)


# --- directories of every kind ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tokenizer_class": "LlamaTokenizer", "legacy": False},
        {"tokenizer_class": "LlamaTokenizerFast", "additional_special_tokens": ["<sep>"]},
        {"added_tokens_decoder": {str(i): {"content": t} for i, t in enumerate(("<unk>", "<s>", "</s>"))}},
        {"clean_up_tokenization_spaces": True, "special_tokens_pattern": "bos_eos"},
    ],
)
def test_whatever_the_files_ask_for(tmp_path, changes):
    ours = small_sentencepiece("strip")
    theirs = load(write_official(tmp_path, sentencepiece_model(), **changes))
    text = "a <sep> b </s> don 't . <eod>\n春"
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))
    assert theirs.eos_token_id == ours.eod_id
    assert theirs.get_added_vocab() == ours.special_tokens


def test_a_model_file_alone(tmp_path):
    write_official(tmp_path, sentencepiece_model())
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).unlink()
    assert load(tmp_path).encode("a <sep> b") == small_sentencepiece("strip").encode("a <sep> b")


@pytest.mark.parametrize("whitespace", ["strip", "keep"])
def test_our_exports(tmp_path, whitespace):
    ours = small_sentencepiece(whitespace)
    write_official(tmp_path, b"")
    ours.save(tmp_path)
    theirs = load(tmp_path)

    @settings(max_examples=40)
    @given(text=TEXT)
    def same(text: str) -> None:
        assert theirs.encode(text) == ours.encode(text)

    same()


@pytest.mark.parametrize("described", [True, False])
def test_our_small_models(tmp_path, described):
    write_official(tmp_path, b"")
    (tmp_path / "tokenizer.model").unlink()
    bpe().save(tmp_path)
    if not described:
        (tmp_path / "tokenizer_config.json").unlink()
    text = "def f(<eod>春"
    theirs = load(tmp_path)
    assert theirs.encode(text) == bpe().encode(text)
    assert theirs.decode(bpe().encode(text)) == text


def test_pieces_that_a_file_finds_in_any_text(tmp_path):
    model = sentencepiece_model(user_defined=("<sep>",))
    ours, theirs = SentencePieceTokenizer(model), load(write_official(tmp_path, model))
    ids = ours.encode("a<sep>b", allow_special=False)
    assert ours.sep_id not in ids
    assert theirs("a<sep>b", split_special_tokens=True)["input_ids"] == ids


# --- what users do with it --------------------------------------------------------------------------------------------


def test_saved_and_opened_again(tmp_path):
    first = load(write_official(tmp_path / "first", sentencepiece_model(), pad_token="<eod>"))
    first.add_tokens(["<tool>"], special_tokens=True)
    first.eos_token = "<sep>"
    first.save_pretrained(tmp_path / "second")
    write_official(tmp_path / "third", b"")
    first.save_pretrained(tmp_path / "third")
    text = "a <sep> b<tool> c</s>"
    for again in (load(tmp_path / "second"), load(tmp_path / "third"), pickle.loads(pickle.dumps(first))):
        assert type(again) is YuanTokenizer
        assert again.encode(text) == first.encode(text)
        assert again.get_added_vocab() == first.get_added_vocab()
        assert (again.eos_token, again.pad_token, again.padding_side) == ("<sep>", "<eod>", "left")
        assert again.chat_template == first.chat_template
        assert again.decode(first.encode(text)) == "a<sep>b<tool> c</s>"
        assert again.decode(first.encode(text), skip_special_tokens=True) == "ab c</s>"


def test_conversations(tmp_path):
    contents = {"user": " q1 ", "assistant": "a1"}
    messages = [{"role": role, "content": contents[role]} for role in ("user", "assistant", "user")]
    ours = load(write_official(tmp_path, sentencepiece_model()))
    assert ours.apply_chat_template(messages, tokenize=False) == render_chat(messages)
    theirs = load(write_official(tmp_path, sentencepiece_model(), chat_template="theirs"))
    assert theirs.apply_chat_template(messages, tokenize=False) == "theirs"


def test_a_padded_batch_generates_what_each_row_alone_does(tmp_path):
    write_safetensors(tmp_path, official_json(CONFIG), official_state(CONFIG, random_state(CONFIG)))
    tokenizer = load(write_official(tmp_path, sentencepiece_model()))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    limits = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    prompts = ["def add(", "春天来了<sep>", "The quick brown fox jumps"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    together = model.generate(**batch, **limits)[:, batch["input_ids"].shape[1] :]
    for prompt, answer in zip(prompts, together, strict=True):
        alone = tokenizer(prompt, return_tensors="pt")
        expected = model.generate(**alone, **limits)[0, alone["input_ids"].shape[1] :]
        assert torch.equal(answer, expected)


def test_errors(tmp_path):
    folder = write_official(tmp_path, b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(TokenizerError, match=r"tokenizer\.model: these 43 bytes are a git-lfs pointer"):
        load(folder)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(TokenizerError, match=r"no tokenizer\.model in this directory; copy the one"):
        load(folder)
    with pytest.raises(UsageError, match="lone surrogate U\\+D800"):
        load(write_official(tmp_path, sentencepiece_model())).encode("\ud800")
