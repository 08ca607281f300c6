"""Tokenizer files that are missing, damaged, of another kind or another model's: a clear error, nothing lost."""

import json
import logging
import os
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models

from small_tokenizers import bpe, sentencepiece_model, small_sentencepiece
from yuanmoe.errors import TokenizerError, UsageError
from yuanmoe.text.bpe import BPETokenizer
from yuanmoe.text.sentencepiece_tokenizer import SentencePieceTokenizer
from yuanmoe.text.tokenizer import check_tokenizer, load_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bpe().save(tmp_path)
    return tmp_path


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(
        TokenizerError, match=r"no tokenizer in .*: neither tokenizer\.model nor tokenizer\.json is there"
    ):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match=r"no tokenizer in .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")


def test_both_kinds_are_found(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The SentencePiece file comes first: a tokenizer.json beside it is some tool's conversion."""
    assert isinstance(load_tokenizer(folder), BPETokenizer)
    small_sentencepiece().save(folder)
    assert isinstance(load_tokenizer(folder), SentencePieceTokenizer)
    assert isinstance(load_tokenizer(folder / "tokenizer.json"), BPETokenizer)
    assert (folder / "tokenizer.model").read_bytes() == sentencepiece_model()
    assert load_tokenizer(folder / "tokenizer.json").encode("x<eod>") == bpe().encode("x<eod>")


def test_another_file_than_the_released_one_is_a_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small_sentencepiece().save(tmp_path)
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert not tokenizer.is_official
    assert "tokenizer.model is not the file released with Yuan 2.0" in caplog.text


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "these 0 bytes are no SentencePiece model"),
        (b"\0" * 50, "these 50 bytes are no SentencePiece model .*fetch it again"),
        (sentencepiece_model()[:-1], r"these \d+ bytes are no SentencePiece model"),
        (sentencepiece_model()[: len(sentencepiece_model()) // 2], r"these \d+ bytes are no SentencePiece model"),
        (b"version https://git-lfs.github.com/spec/v1\n", "these 43 bytes are a git-lfs pointer, .*run git lfs pull"),
        (sentencepiece_model(byte_fallback=False), "has no byte pieces, so text outside its vocabulary would be lost"),
    ],
)
def test_damaged_sentencepiece(tmp_path: Path, content: bytes, complaint: str) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    with pytest.raises(TokenizerError, match=rf"tokenizer\.model: .*{complaint}"):
        load_tokenizer(tmp_path)


def test_every_truncation_of_a_sentencepiece_file(sentencepiece_folder: Path) -> None:
    """Cut anywhere, also between two pieces, where what is left is still well-formed."""
    model = (sentencepiece_folder / "tokenizer.model").read_bytes()
    half = len(model) // 2
    for cut in (*range(1000, len(model), len(model) // 20), *range(half, half + 20), len(model) - 1):
        with pytest.raises(TokenizerError, match=f"these {cut} bytes are no SentencePiece model"):
            SentencePieceTokenizer(model[:cut])


@pytest.mark.parametrize(
    "content", [b"", b"{", b"{}", b"[1]", b"\xff\xfe", b'{"version": "1.0"}', b"version https://git"]
)
def test_damaged_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is no tokenizer\.json .*fetch or train it again"):
        load_tokenizer(tmp_path)


def test_every_truncation_of_our_file(folder: Path) -> None:
    file = folder / "tokenizer.json"
    content = file.read_bytes()
    for cut in range(0, len(content), 997):
        file.write_bytes(content[:cut])
        with pytest.raises(TokenizerError, match=r"is no tokenizer\.json"):
            load_tokenizer(folder)


def test_another_kind_of_json(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        TokenizerError, match=r"a Unigram model with decoder NoneType is not byte-level BPE; .*conversion"
    ):
        load_tokenizer(tmp_path)


def edited(folder: Path, edit) -> Path:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    edit(content)
    file.write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_no_special_tokens(folder: Path) -> None:
    edited(folder, lambda content: content.update(added_tokens=content["added_tokens"][1:]))
    with pytest.raises(
        TokenizerError, match=r"tokenizer\.json has no special token <eod>, only 5 others \(<sep>, <pad>"
    ):
        load_tokenizer(folder)


def test_no_fill_in_the_middle(folder: Path) -> None:
    edited(folder, lambda content: content.update(added_tokens=content["added_tokens"][:3]))
    tokenizer = load_tokenizer(folder)
    with pytest.raises(TokenizerError, match="has no special token <FIM_PREFIX>, only 3 others"):
        tokenizer.fim("a", "b")


def test_ids_with_holes(folder: Path) -> None:
    edited(folder, lambda content: content["model"]["vocab"].update({"!": 5000}))
    with pytest.raises(TokenizerError, match=r"400 tokens do not have the ids 0\.\.399"):
        load_tokenizer(folder)


def test_tokens_that_are_no_bytes() -> None:
    backend = tokenizers.Tokenizer(models.BPE({"春": 0}, []))
    backend.decoder = decoders.ByteLevel()
    with pytest.raises(TokenizerError, match="a token holds the character '春', which spells no byte"):
        BPETokenizer(backend)


def test_added_tokens_are_taken_as_they_are_written() -> None:
    """A file of others may add tokens that are not special; their text is no spelling of bytes."""
    backend = tokenizers.Tokenizer.from_str(bpe()._to_file().decode())
    backend.add_tokens([tokenizers.AddedToken("\u4e2d \u6587", special=False)])
    tokenizer = BPETokenizer(backend)
    assert tokenizer.encode("\u4e2d \u6587!")[0] == 400
    assert tokenizer.decode(tokenizer.encode("\u4e2d \u6587!")) == "\u4e2d \u6587!"
    assert len(tokenizer.special_tokens) == 6


def test_another_models_tokenizer() -> None:
    check_tokenizer(bpe(), 400)
    check_tokenizer(bpe(), 512, eod_id=0)
    with pytest.raises(
        TokenizerError, match=r"has ids 0\.\.399, the model's vocabulary ends at 398 \(399 rows\); use the"
    ):
        check_tokenizer(bpe(), 399)
    with pytest.raises(TokenizerError, match="the tokenizer's <eod> is 0, the model's is 77185; use the"):
        check_tokenizer(bpe(), 135040, eod_id=77185)


def test_unknown_whitespace_behaviour() -> None:
    with pytest.raises(UsageError, match="whitespace is 'drop'; it must be 'strip'"):
        SentencePieceTokenizer(sentencepiece_model(), whitespace="drop")  # type: ignore[arg-type]


@pytest.mark.parametrize("token_id", [-1, 400, 10**12])
def test_ids_outside_the_vocabulary(token_id: int) -> None:
    for use in (lambda: bpe().decode([0, token_id]), lambda: bpe().token_text(token_id)):
        with pytest.raises(
            TokenizerError, match=rf"token id {token_id} is outside 0\.\.399 of the tokenizer; .*padding"
        ):
            use()


def test_an_interrupted_save_leaves_the_old_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "tokenizer.json").read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        bpe().save(folder)
    assert (folder / "tokenizer.json").read_bytes() == before
