"""Text in, text out: what is streamed is what is decoded, up to a stop string or token, alone and among others."""

import functools
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import yuanmoe
from small_lm import lm_config, small_lm, write_lm
from small_models import random_model
from small_tokenizers import bpe
from yuanmoe.checkpoint.load import usable_device
from yuanmoe.checkpoint.write.convert import convert_checkpoint
from yuanmoe.errors import CheckpointError, ConfigError, ContextLengthError, TokenizerError, UsageError
from yuanmoe.lm import LanguageModel
from yuanmoe.text.detokenize import StreamingDetokenizer

WARM = {"temperature": 1.5, "seed": 7, "max_new_tokens": 24}


@functools.cache
def shared_lm():
    return small_lm()


@pytest.fixture
def lm():
    return shared_lm()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_lm(folder)
    return folder


def test_pieces_are_the_text_and_the_text_is_what_the_tokens_say(lm):
    stream = lm.stream("def add(", **WARM)
    pieces = list(stream)
    completion = stream.completion
    assert "".join(pieces) == completion.text == lm.tokenizer.decode(completion.ids, skip_special=True)
    assert len(completion.ids) == len(completion.logprobs) == 24
    assert completion.prompt_tokens == len(lm.tokenizer.encode("def add("))
    assert completion.timing.prefill_tokens == completion.prompt_tokens
    assert completion.finish_reason == "length"


def test_a_character_cut_in_two_is_marked(lm):
    characters = StreamingDetokenizer(lm.tokenizer, skip_special=True)
    whole = ""
    for length, token_id in enumerate(ids := lm.generate("def add(", **WARM).ids, start=1):
        whole += characters.push(token_id)
        if (text := lm.tokenizer.decode(ids[:length], skip_special=True)) != whole:
            break
    assert text == whole + "\ufffd"
    assert lm.generate("def add(", **WARM | {"max_new_tokens": length}).text == text


@settings(max_examples=5)
@given(prompts=st.lists(st.sampled_from(["", "def", "写一篇", "a<sep>b", "for number in"]), min_size=1, max_size=3))
def test_a_batch_says_what_each_prompt_would_alone(prompts):
    lm = shared_lm()
    together = lm.generate_batch(prompts, stop=["e"], **WARM)
    for prompt, completion in zip(prompts, together, strict=True):
        alone = lm.generate(prompt, stop=["e"], **WARM)
        assert (completion.text, completion.ids) == (alone.text, alone.ids)
        assert completion.finish_reason == alone.finish_reason


@functools.cache
def free_answer():
    return shared_lm().generate("def add(", **WARM)


@settings(max_examples=10)
@given(data=st.data())
def test_a_stop_string_ends_the_text_before_it_and_the_work_with_it(data):
    lm, free = shared_lm(), free_answer()
    start = data.draw(st.integers(0, len(free.text) - 1))
    stop = free.text[start : start + data.draw(st.integers(1, 4))]
    stream = lm.stream("def add(", stop=[stop], **WARM)
    assert "".join(stream) == stream.completion.text == free.text[: free.text.index(stop)]
    assert stream.completion.finish_reason == "stop"
    said = lm.tokenizer.decode(stream.completion.ids, skip_special=True)
    assert stop in said
    assert stop not in lm.tokenizer.decode(stream.completion.ids[:-1], skip_special=True)


def test_a_stop_token_is_counted_and_not_shown(lm):
    free = lm.generate("def add(", **WARM)
    stop_id = free.ids[5]
    place = free.ids.index(stop_id)
    completion = lm.generate("def add(", stop_ids=(stop_id,), **WARM)
    assert completion.ids == free.ids[: place + 1]
    assert completion.text == lm.tokenizer.decode(free.ids[:place], skip_special=True)
    assert completion.finish_reason == "stop"


def test_the_end_of_a_document_stops_by_default():
    model = random_model(lm_config(bpe()))
    lm = LanguageModel(model, bpe())
    with torch.no_grad():  # Every score is 0, and of equals the lowest id is taken: `<eod>`.
        model.model.norm.weight.zero_()
    completion = lm.generate("def")
    assert (completion.ids, completion.text, completion.finish_reason) == ([lm.tokenizer.eod_id], "", "stop")
    assert len(lm.generate("def", stop_ids=(), max_new_tokens=5).ids) == 5


def test_an_answer_cut_short_keeps_all_that_was_said(lm):
    whole = lm.generate("def add(", **WARM)
    stream = lm.stream("def add(", stop=["never said"], **WARM)
    pieces = []
    for piece in stream:
        pieces.append(piece)
        if len(stream.completion.ids) == 12:
            break
    pieces.append(stream.finish())
    expected = lm.tokenizer.decode(whole.ids[:12], skip_special=True)
    assert "".join(pieces) == stream.completion.text == expected
    assert stream.completion.finish_reason is None


def test_an_empty_prompt_starts_a_document(lm):
    assert lm.text_ids("") == [lm.tokenizer.eod_id]
    assert lm.generate("", max_new_tokens=4).ids == lm.generate([lm.tokenizer.eod_id], max_new_tokens=4).ids


def test_chat_and_fill_are_prompts_of_their_own(lm):
    question = [{"role": "user", "content": "why <eod>?"}]
    tokenizer = lm.tokenizer
    asked = [*tokenizer.encode("why <eod>?", allow_special=False), tokenizer.sep_id]
    assert lm.chat_ids(question) == asked
    assert lm.chat(question, max_new_tokens=5).ids == lm.generate(asked, max_new_tokens=5).ids
    hole = tokenizer.fim("def f(", "return x")
    assert lm.fill("def f(", "return x", max_new_tokens=5).ids == lm.generate(hole, max_new_tokens=5).ids


def test_routing_comes_with_every_token_but_the_last(lm):
    completion = lm.generate("def add(", routing=True, max_new_tokens=4)
    assert [routing is None for routing in completion.routings] == [False, False, False, True]


def test_scores_are_of_every_token_after_the_start_of_a_document(lm):
    ids = [lm.tokenizer.eod_id, *lm.tokenizer.encode("def add(first")]
    whole = lm.model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    expected = [whole[place, token_id].item() for place, token_id in enumerate(ids[1:])]
    assert lm.score("def add(first") == pytest.approx(expected, abs=1e-4)
    assert lm.perplexity("def add(first") == pytest.approx(math.exp(-sum(expected) / len(expected)), rel=1e-4)
    with pytest.raises(UsageError, match="1 tokens: at least 2"):
        lm.perplexity("")


def test_a_loaded_model_answers_as_the_one_that_was_saved(lm, folder):
    loaded = yuanmoe.load(folder)
    assert loaded.generate("def add(", max_new_tokens=8).ids == lm.generate("def add(", max_new_tokens=8).ids
    half = yuanmoe.load(folder, dtype="bfloat16", rope_theta=40890.0)
    assert half.model.model.norm.weight.dtype == torch.bfloat16
    assert half.config.rope_theta == 40890.0


def test_what_cannot_be_loaded_says_why(folder, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        yuanmoe.load(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="unknown dtype 'int3'"):
        yuanmoe.load(folder, dtype="int3")


def test_unknown_keys_may_be_ignored(folder, tmp_path):
    convert_checkpoint(folder, tmp_path / "official", to="official")
    (tmp_path / "official" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    file = tmp_path / "official" / "config.json"
    file.write_text(file.read_text().replace("{", '{"surprise": 1, ', 1))
    with pytest.raises(ConfigError, match=r"official/config\.json: unknown config key 'surprise'.*take it out of"):
        yuanmoe.load(tmp_path / "official")
    assert yuanmoe.load(tmp_path / "official", ignore_unknown=True).config.vocab_size == shared_lm().config.vocab_size


@pytest.mark.parametrize("name", ["foo", "cuda:99", "meta"])
def test_a_device_that_is_not_here_is_refused_before_anything_is_opened(tmp_path, name):
    with pytest.raises(UsageError, match=rf"there is no device '{name}' for torch [\d.]+.* known: cpu"):
        yuanmoe.load(tmp_path / "nowhere", device=name)


def test_without_a_gpu_cuda_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(
        UsageError, match=r"there is no device 'cuda'.*(built for the CPU alone|sees no GPU).*known: cpu$"
    ):
        yuanmoe.load(tmp_path / "nowhere", device="cuda")
    assert usable_device() == torch.device("cpu")


def test_a_tokenizer_of_another_model_is_refused_before_weights_are_read(tmp_path, monkeypatch):
    write_lm(tmp_path)
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json").read_text().replace('"eod_token_id": 0', '"eod_token_id": 7')
    )
    monkeypatch.setattr("yuanmoe.lm.model_of", None)
    with pytest.raises(TokenizerError, match="the tokenizer's <eod> is 0, the model's is 7"):
        yuanmoe.load(tmp_path)
    with pytest.raises(TokenizerError, match="the model's vocabulary ends at"):
        LanguageModel(random_model(lm_config(bpe(), vocab_size=100)), bpe())


def test_a_text_longer_than_the_context_is_refused(lm):
    with pytest.raises(ContextLengthError, match="exceeds the model's context of 128"):
        lm.generate("x" * 1000)


def test_the_package_imports_no_torch_and_names_its_version():
    code = "import sys, yuanmoe; print(yuanmoe.__version__, 'torch' in sys.modules, 'load' in yuanmoe.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [yuanmoe.__version__, "False", "True"]
    with pytest.raises(AttributeError, match="module 'yuanmoe' has no attribute 'lode'"):
        _ = yuanmoe.lode
