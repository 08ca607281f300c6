"""Text to datasets: what goes in comes out, and the bytes depend on nothing but text, tokenizer and options."""

import gzip
import json
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from small_tokenizers import TEXT, bpe, small_sentencepiece
from yuanmoe.data.prepare.formats import FormatOptions
from yuanmoe.data.prepare.output import DatasetWriter
from yuanmoe.data.prepare.pack import PackOptions, pack_dataset, pack_texts
from yuanmoe.data.sets.packed import PackedTokens
from yuanmoe.data.sets.verify import verify_dataset

SMALL = {"chunk_bytes": 40, "shard_tokens": 60}
TEXTS = st.lists(TEXT, min_size=1, max_size=12).filter(lambda texts: any(text.strip() for text in texts))


def options(**changes):
    read = FormatOptions(**{name: changes.pop(name) for name in list(changes) if name in FormatOptions.__slots__})
    return PackOptions(read=read, **SMALL | changes)


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def texts_of(tokens, tokenizer):
    lengths = tokens.lengths(np.arange(tokens.num_documents)).tolist()
    documents = [tokens.read(number, 0, length).tolist() for number, length in enumerate(lengths)]
    assert all(document[-1] == tokenizer.eod_id for document in documents)
    assert np.array_equal(tokens[:], np.concatenate(documents))
    return [tokenizer.decode(document[:-1]) for document in documents]


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@settings(max_examples=25)
@given(texts=TEXTS)
def test_text_comes_back(texts, tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("pack"), bpe()
    source = write_lines(folder / "in.jsonl", [{"id": 1, "body": text} for text in texts])
    (tokens,) = pack_dataset([source], folder / "out", tokenizer, options(text_field="body"))
    kept = [text for text in texts if text.strip()]
    assert texts_of(tokens, tokenizer) == kept
    found = tokens.manifest
    assert found.skipped == ({"empty": len(texts) - len(kept)} if len(kept) < len(texts) else {})
    assert found.text_bytes == sum(len(text.encode()) for text in kept)
    assert (len(tokens), found.num_documents, found.source_bytes) == (
        found.num_tokens,
        len(kept),
        source.stat().st_size,
    )
    assert verify_dataset(tokens, tokenizer) == sum(path.stat().st_size for path in (folder / "out").iterdir()) - sum(
        (folder / "out" / name).stat().st_size for name in ("manifest.json", "tokenizer_config.json")
    )


@settings(max_examples=15)
@given(texts=TEXTS, places=st.lists(st.integers(0, 400), min_size=2, max_size=2))
def test_a_dataset_is_a_row_of_tokens(texts, places, tmp_path_factory):
    folder = tmp_path_factory.mktemp("row")
    source = write_lines(folder / "in.jsonl", [{"text": text} for text in texts])
    (tokens,) = pack_dataset([source], folder / "out", bpe(), options())
    row = [token for text in texts if text.strip() for token in [*bpe().encode(text, allow_special=False), 0]]
    start, stop = places
    assert tokens[start:stop].tolist() == row[start:stop]
    assert len(tokens) == len(row)


RECORDS = [{"text": f"def number_{place}():\n    return {place} ** 2  # \u6625\u5929\n"} for place in range(40)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same documents in every container, in one order."""
    folder = tmp_path_factory.mktemp("sources")
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()
    (folder / "plain.jsonl").write_bytes(lines.rstrip())
    (folder / "zipped.jsonl.gz").write_bytes(gzip.compress(lines[:1000]) + gzip.compress(lines[1000:]))
    frames = [zstandard.compress(lines[:1000]), zstandard.compress(lines[1000:])]
    (folder / "frames.jsonl.zst").write_bytes(b"".join(frames))
    table = pyarrow.table({"id": range(40), "text": [record["text"] for record in RECORDS]})
    parquet.write_table(table, folder / "table.parquet", row_group_size=7)
    tree = folder / "tree"
    for place, record in enumerate(RECORDS):
        path = tree / f"{place // 10}" / f"{place:02}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(record["text"])
    escaped = [record["text"].replace("\n", "<n>") for record in RECORDS]
    (folder / "official.txt").write_text("".join(f"{line}\n" for line in escaped))
    return folder


@pytest.mark.parametrize("name", ["plain.jsonl", "zipped.jsonl.gz", "frames.jsonl.zst", "table.parquet", "tree"])
def test_every_container_gives_the_same_tokens(sources, name, tmp_path):
    (tokens,) = pack_dataset([sources / name], tmp_path / "out", bpe(), options())
    assert texts_of(tokens, bpe()) == [record["text"] for record in RECORDS]
    assert tokens.manifest.num_shards > 5


def test_official_lines_lose_their_outer_whitespace(sources, tmp_path):
    (tokens,) = pack_dataset([sources / "official.txt"], tmp_path / "out", bpe(), options(format="official"))
    assert texts_of(tokens, bpe()) == [record["text"].strip() for record in RECORDS]


def test_the_bytes_do_not_depend_on_workers_nor_on_the_time(sources, tmp_path):
    inputs = [sources / name for name in ("zipped.jsonl.gz", "tree", "table.parquet")]
    for workers in (1, 2, 3):
        pack_dataset(inputs, tmp_path / f"by-{workers}", bpe(), options(), workers=workers)
    alone = files_of(tmp_path / "by-1")
    assert alone == files_of(tmp_path / "by-2") == files_of(tmp_path / "by-3")
    listed = [json.loads(line) for line in alone["sources.jsonl"].splitlines()]
    assert [line["path"] for line in listed][1:3] == ["tree/0/00.py", "tree/0/01.py"]
    assert len(listed) == 42


@settings(max_examples=8)
@given(cuts=st.lists(st.integers(0, 60), min_size=1, max_size=3))
def test_an_interrupted_run_ends_as_an_uninterrupted_one(sources, cuts, tmp_path_factory):
    """An error at any chunk, again and again; what was written after the last finished shard is done again."""
    folder = tmp_path_factory.mktemp("cut")
    inputs = [sources / name for name in ("frames.jsonl.zst", "tree", "table.parquet")]
    how = options(heldout_share=0.2, shard_tokens=400)
    pack_dataset(inputs, folder / "whole", bpe(), how)
    original = DatasetWriter.append
    for cut in cuts:
        left = [cut]

        def append_or_die(self, chunk, encoded, left=left):
            original(self, chunk, encoded)
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(DatasetWriter, "append", append_or_die)
            pack_dataset(inputs, folder / "cut", bpe(), how, overwrite=True)
    pack_dataset(inputs, folder / "cut", bpe(), how, overwrite=True)
    assert files_of(folder / "cut") == files_of(folder / "whole")
    assert not (folder / "cut.partial").exists()
    shutil.rmtree(folder)


def test_equal_documents_are_held_out_together(tmp_path):
    records = [{"text": f"number {place % 50}"} for place in range(200)]
    source = write_lines(tmp_path / "in.jsonl", records)
    train, heldout = pack_dataset([source], tmp_path / "out", bpe(), options(heldout_share=0.3))
    assert [tokens.name for tokens in (train, heldout)] == [
        str(tmp_path / "out" / name) for name in ("train", "heldout")
    ]
    learned, measured = set(texts_of(train, bpe())), set(texts_of(heldout, bpe()))
    assert not learned & measured
    assert len(learned | measured) == 50
    assert train.num_documents + heldout.num_documents == 200
    assert 20 < heldout.num_documents < 120


def test_masks_lie_beside_their_tokens(tmp_path):
    talks = [[{"role": "user", "content": "a" * n}, {"role": "assistant", "content": "b" * n}] for n in range(1, 30)]
    source = write_lines(tmp_path / "in.jsonl", [{"messages": talk} for talk in talks])
    (tokens,) = pack_dataset([source], tmp_path / "out", bpe(), options(format="chat"))
    assert tokens.manifest.num_shards > 3
    trained = 0
    for document in range(29):
        length = int(tokens.lengths(np.array([document]))[0])
        ids, mask = tokens.read(document, 0, length), tokens.mask(document, 0, length)
        assert mask is not None
        assert np.array_equal(np.arange(length) >= ids.tolist().index(bpe().sep_id), mask)
        assert np.array_equal(tokens.mask(document, 2, length - 1), mask[2:-1])
        trained += int(mask.sum())
    assert tokens.manifest.trained_tokens == trained


def test_official_lines_with_a_mask(tmp_path):
    (tmp_path / "in.txt").write_text("q[SEP]a<n>b\nplain\n")
    (tokens,) = pack_dataset([tmp_path / "in.txt"], tmp_path / "out", bpe(), options(format="official-sft"))
    assert texts_of(tokens, bpe()) == ["q<sep>a\nb", "plain"]
    assert tokens.mask(0, 0, 5).tolist() == [False, True, True, True, True]
    assert tokens.mask(1, 0, 3).tolist() == [True] * 3


def test_the_released_rule_for_conversations(tmp_path):
    talk = [{"role": role, "content": "x"} for role in ("user", "assistant") * 2]
    source = write_lines(tmp_path / "in.jsonl", [{"messages": talk}])
    (tokens,) = pack_dataset([source], tmp_path / "out", bpe(), options(format="chat", loss="official"))
    mask = tokens.mask(0, 0, tokens.num_tokens)
    assert mask.tolist() == [False] * (len(tokens) - 3) + [True] * 3


def test_a_large_vocabulary_takes_four_bytes(tmp_path, monkeypatch):
    tokenizer = small_sentencepiece()
    monkeypatch.setattr(type(tokenizer), "vocab_size", property(lambda self: 135040))
    tokens = pack_texts(["one", "two"], tmp_path / "out", tokenizer)
    assert (tmp_path / "out" / "shard-00000.bin").stat().st_size == 4 * len(tokens)
    assert texts_of(PackedTokens(tmp_path / "out"), tokenizer) == ["one", "two"]


def test_texts_at_hand_are_packed_as_files_are(tmp_path):
    texts = [record["text"] for record in RECORDS]
    tokens = pack_texts(["", *texts], tmp_path / "out", bpe())
    assert texts_of(tokens, bpe()) == texts
    assert sorted(path.name for path in Path(tokens.path).iterdir()) == [
        *("documents.idx", "manifest.json", "shard-00000.bin", "sources.jsonl", "tokenizer.json"),
        "tokenizer_config.json",
    ]
