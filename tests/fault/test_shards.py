"""Shards of tokens: written and read back, and refused by name when they are incomplete or damaged."""

import pytest

from small_tokenizers import TEXTS, bpe
from yuanmoe.data.shards import open_shard, write_shard
from yuanmoe.errors import DataError

HOSTILE = "print('<eod>')  # <sep>\n"


@pytest.fixture
def shard(tmp_path):
    return write_shard(tmp_path / "tokens" / "train", [*TEXTS, HOSTILE], bpe())


def test_a_shard_is_its_documents_each_with_an_end(shard):
    tokenizer = bpe()
    ends = [place for place, token_id in enumerate(shard.ids) if token_id == tokenizer.eod_id]
    starts = [0, *(end + 1 for end in ends)]
    documents = [tokenizer.decode(shard.ids[start:end].tolist()) for start, end in zip(starts, ends, strict=False)]
    assert documents == [*TEXTS, HOSTILE]
    assert shard.index.num_documents == len(documents)
    assert shard.index.num_tokens == len(shard.ids)
    assert shard.bytes_per_token == sum(len(text.encode()) for text in documents) / len(shard.ids)


def test_the_same_texts_give_the_same_bytes(shard, tmp_path):
    assert write_shard(tmp_path / "again", [*TEXTS, HOSTILE], bpe()).index == shard.index


def test_a_shard_cut_short_is_refused(shard, tmp_path):
    data = tmp_path / "tokens" / "train.bin"
    data.write_bytes(data.read_bytes()[:-2])
    size = 2 * shard.index.num_tokens
    with pytest.raises(DataError, match=rf"train.bin has {size - 2} bytes where {size // 2} tokens take {size}"):
        open_shard(tmp_path / "tokens" / "train")
    data.unlink()
    with pytest.raises(DataError, match=r"train.bin has 0 bytes"):
        open_shard(tmp_path / "tokens" / "train")


def test_a_shard_without_its_index_is_none(shard, tmp_path):
    index = tmp_path / "tokens" / "train.json"
    index.write_text('{"num_tokens": 3}')
    with pytest.raises(DataError, match=r"train.json does not describe tokens"):
        open_shard(tmp_path / "tokens" / "train")
    index.unlink()
    with pytest.raises(DataError, match=r"train.json is missing"):
        open_shard(tmp_path / "tokens" / "train")


def test_an_interrupted_write_leaves_no_shard(shard, tmp_path):
    def texts():
        yield "first"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "tokens" / "train", texts(), bpe())
    with pytest.raises(DataError, match=r"train.json is missing"):
        open_shard(tmp_path / "tokens" / "train")


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_nothing_to_tokenize_is_refused(texts, tmp_path):
    with pytest.raises(DataError, match=f"no text for .*{len(texts)} documents"):
        write_shard(tmp_path / "train", texts, bpe())
