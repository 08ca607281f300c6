"""Packed data sets whose files are damaged or lie, or do not fit the model: found, and said."""

import hashlib
import json

import numpy as np
import pytest

from small_documents import Lists
from small_tokenizers import bpe, small_sentencepiece
from yuanmoe.data.loader.loader import LoaderOptions, WeightedDocuments
from yuanmoe.data.prepare.pack import pack_texts
from yuanmoe.data.sets.datasets import check_datasets_fit, open_documents, open_sources
from yuanmoe.data.sets.manifest import DatasetManifest
from yuanmoe.data.sets.packed import PackedTokens
from yuanmoe.data.sets.verify import verify_dataset
from yuanmoe.errors import DataError, TokenizerError, UsageError
from yuanmoe.presets import preset


@pytest.fixture
def dataset(tmp_path):
    return pack_texts(["one", "two three"], tmp_path / "set", bpe())


def test_a_damaged_file_is_found(dataset):
    assert verify_dataset(dataset, bpe()) > 0
    path = dataset.path / "shard-00000.bin"
    data = bytearray(path.read_bytes())
    data[2] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        DataError, match=r"shard-00000\.bin is damaged: its sha256 is \w{12}\.\., \w{12}\.\. was written"
    ):
        verify_dataset(PackedTokens(dataset.path))
    path.write_bytes(b"\xff" * len(data))
    with pytest.raises(DataError, match=r"shard-00000\.bin holds the token id 65535, outside the vocabulary of 400"):
        verify_dataset(PackedTokens(dataset.path))
    path.write_bytes(data[:-1])
    with pytest.raises(
        DataError, match=rf"bin has {len(data) - 1} bytes where {len(data)} were written; it is damaged"
    ):
        PackedTokens(dataset.path)
    path.unlink()
    with pytest.raises(DataError, match=r"bin has 0 bytes where"):
        PackedTokens(dataset.path)


def rewrite(dataset, **changes):
    path = dataset.path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return PackedTokens(dataset.path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": "5"}, r"does not describe tokens \(see num_tokens\); pack them again"),
        ({"num_tokens": -1}, r"see num_tokens"),
        ({"num_tokens": True}, r"see num_tokens"),
        ({"colour": 1}, r"see colour"),
        ({"files": {}}, r"does not list shard-00000\.bin"),
        ({"num_tokens": 9}, r"speaks of 9 tokens in 2 documents, the files hold \d+ in 2"),
        ({"version": 2}, r"is of \{'format': 'yuanmoe-tokens', 'version': 2\}, this version reads"),
    ],
)
def test_a_manifest_that_lies(dataset, changes, message):
    with pytest.raises(DataError, match=message):
        rewrite(dataset, **changes)


def test_a_manifest_that_is_none(dataset):
    path = dataset.path / "manifest.json"
    path.write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json does not describe tokens \(Expecting"):
        PackedTokens(dataset.path)
    path.unlink()
    with pytest.raises(DataError, match=r"manifest\.json is missing, so there are no finished tokens"):
        PackedTokens(dataset.path)
    with pytest.raises(DataError, match=r"set is no dataset: there is neither .*manifest\.json nor .*set\.idx"):
        open_documents(dataset.path)
    assert DatasetManifest.__slots__


def test_an_index_that_lies(dataset):
    index = dataset.path / "documents.idx"
    np.array([len(dataset) - 1, len(dataset) - 1], "<u8").tofile(index)
    manifest = json.loads((dataset.path / "manifest.json").read_text())
    manifest["files"]["documents.idx"]["sha256"] = hashlib.sha256(index.read_bytes()).hexdigest()
    with pytest.raises(DataError, match=r"documents\.idx ends at token \d+ of \d+"):
        verify_dataset(rewrite(dataset, **manifest))
    np.array([len(dataset), 2], "<u8").tofile(index)
    manifest["files"]["documents.idx"]["sha256"] = hashlib.sha256(index.read_bytes()).hexdigest()
    with pytest.raises(DataError, match=r"documents\.idx has a document of -\d+ tokens"):
        verify_dataset(rewrite(dataset, **manifest))


def test_what_does_not_fit_the_model_is_said_before_anything_is_computed(dataset):
    config = preset("tiny", vocab_size=512)
    how = LoaderOptions(length=4, batch_size=1, vocab_size=512)
    sources = open_sources(["2", str(dataset.path)])
    check_datasets_fit(sources, how, config, bpe())
    long = LoaderOptions(length=300, batch_size=1, vocab_size=512)
    with pytest.raises(DataError, match=r"windows of 300 tokens exceed the model's context of 256"):
        check_datasets_fit(sources, long, config)
    with pytest.raises(DataError, match=r"holds ids of a vocabulary of 400, the model's is 399"):
        check_datasets_fit(
            sources, LoaderOptions(length=4, batch_size=1, vocab_size=399), preset("tiny", vocab_size=399)
        )
    with pytest.raises(DataError, match=r"ids below 512 are let through, the model has 500 rows"):
        check_datasets_fit(sources, how, preset("tiny", vocab_size=500))
    with pytest.raises(DataError, match=r"end with 0, the model's <eod> is 7; pack the text again"):
        check_datasets_fit(sources, how, config.replace(eod_token_id=7))
    other = small_sentencepiece()
    with pytest.raises(
        DataError, match=r"set was packed with another tokenizer: sha256 \w{12} with 400 ids, this one is"
    ):
        check_datasets_fit(sources, how, config.replace(eod_token_id=other.eod_id, vocab_size=512), other)
    with pytest.raises(TokenizerError, match=r"<eod> is 0, the model's is 7"):
        check_datasets_fit([WeightedDocuments(documents=Lists([[1]]))], how, config.replace(eod_token_id=7), bpe())
    with pytest.raises(UsageError, match="are no mixture"):
        open_sources([])
