"""Packing that is killed, starved of disk, or given what is no text: nothing is lost, and what is wrong is said."""

import gzip
import json
import os
import resource
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from small_documents import Lists
from small_tokenizers import bpe
from small_work import make_dying, make_failing
from yuanmoe.data.prepare.formats import FormatOptions
from yuanmoe.data.prepare.output import DatasetWriter
from yuanmoe.data.prepare.pack import PackOptions, pack_dataset
from yuanmoe.data.prepare.workers import map_ordered
from yuanmoe.data.sets.megatron import MegatronTokens, write_megatron
from yuanmoe.data.sources import records
from yuanmoe.data.sources.inputs import find_inputs
from yuanmoe.errors import DataError, MissingExtraError, ResourceError

DEADLINE_S = 60

SCRIPT = """
import sys, time
from yuanmoe.data.prepare.pack import PackOptions, pack_dataset
from yuanmoe.text.tokenizer import load_tokenizer
if __name__ == "__main__":
    source, out, tokenizer = sys.argv[1:]
    slow = lambda done, total: time.sleep(0.03)
    options = PackOptions(chunk_bytes=4000, shard_tokens=12_000)
    pack_dataset([source], out, load_tokenizer(tokenizer), options, workers=2, progress=slow)
"""


def write_lines(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def options(**changes):
    read = FormatOptions(**{name: changes.pop(name) for name in list(changes) if name in FormatOptions.__slots__})
    return PackOptions(read=read, **changes)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def children_of(process_id):
    statuses = (path.read_text().rsplit(")", 1) for path in Path("/proc").glob("[0-9]*/stat") if path.is_file())
    parents = {int(before.split()[0]): int(after.split()[1]) for before, after in statuses}
    return [child for child, parent in parents.items() if parent == process_id]


def wait_until(true, what):
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_killed_at_any_moment_it_goes_on_and_leaves_no_process(tmp_path):
    (tmp_path / "pack.py").write_text(SCRIPT)
    bpe().save(tmp_path / "tokenizer")
    source = write_lines(tmp_path / "in.jsonl", *({"text": f"line {place} of many\n" * 9} for place in range(1000)))
    command = [sys.executable, *map(str, (tmp_path / "pack.py", source, tmp_path / "out", tmp_path / "tokenizer"))]
    journal = tmp_path / "out.partial" / "dataset" / "journal.json"

    def shards():
        return json.loads(journal.read_text())["num_shards"] if journal.is_file() else 0

    for wanted in (1, 4):
        with subprocess.Popen(command) as process:
            wait_until(lambda: shards() >= wanted, "shards")  # noqa: B023
            children = children_of(process.pid)
            process.kill()
        assert len(children) >= 2
        wait_until(lambda: not any(Path(f"/proc/{child}").exists() for child in children), "an end")  # noqa: B023
        assert not (tmp_path / "out").exists()
    done = subprocess.run(command, capture_output=True, check=True, timeout=DEADLINE_S)
    assert b"going on in" in done.stderr
    pack_dataset([source], tmp_path / "whole", bpe(), PackOptions(chunk_bytes=4000, shard_tokens=12_000))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@contextmanager
def largest_file(size):
    """A disk that takes no more than this for a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_what_is_finished(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", *({"text": "some text " * 50} for _ in range(400)))
    how = PackOptions(chunk_bytes=4000, shard_tokens=1 << 20)
    with (
        largest_file(60_000),
        pytest.raises(ResourceError, match=r"the disk is full: File too large in .*out\.partial"),
    ):
        pack_dataset([source], tmp_path / "out", bpe(), how)
    assert not (tmp_path / "out").exists()
    pack_dataset([source], tmp_path / "out", bpe(), how)
    pack_dataset([source], tmp_path / "other", bpe(), how)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "other")


def test_a_full_disk_leaves_no_half_of_a_megatron_pair(tmp_path):
    documents = Lists([range(60_000)])
    with (
        largest_file(60_000),
        pytest.raises(ResourceError, match=r"cannot write .*pair\.bin.*: File too large; make room"),
    ):
        write_megatron(documents, tmp_path / "pair", vocab_size=65536)
    assert list(tmp_path.iterdir()) == []
    write_megatron(documents, tmp_path / "pair", vocab_size=65536)
    assert MegatronTokens(tmp_path / "pair").num_tokens == 60_000


def test_other_text_or_settings_start_over(tmp_path, monkeypatch):
    source = write_lines(tmp_path / "in.jsonl", *({"text": f"text {place} " * 20} for place in range(20)))
    said = []

    def interrupted(self, *_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DatasetWriter, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pack_dataset([source], tmp_path / "out", bpe(), options(shard_tokens=100, chunk_bytes=100))
    write_lines(source, {"text": "other"})
    (tokens,) = pack_dataset(
        [source], tmp_path / "out", bpe(), options(shard_tokens=100, chunk_bytes=100), say=said.append
    )
    assert said == []
    assert bpe().decode(tokens[:-1].tolist()) == "other"


def test_what_is_there_is_left_or_replaced(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", {"text": "one"})
    pack_dataset([source], tmp_path / "out", bpe())
    before = files_of(tmp_path / "out")
    write_lines(source, {"text": "two"})
    with pytest.raises(DataError, match=r"out exists and is left as it is; choose another name, or overwrite=True"):
        pack_dataset([source], tmp_path / "out", bpe())
    assert files_of(tmp_path / "out") == before
    pack_dataset([source], tmp_path / "out", bpe(), overwrite=True)
    assert files_of(tmp_path / "out") != before
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(
        DataError, match=r"home is not a dataset \(it has no documents\.idx\), so it is not overwritten"
    ):
        pack_dataset([source], tmp_path / "home", bpe(), overwrite=True)
    with pytest.raises(DataError, match=r"letter\.txt is read, and lies in .*home, which is written"):
        pack_dataset([tmp_path / "home" / "letter.txt"], tmp_path / "home", bpe())


def refused(tmp_path, name, content, message, error=DataError, **changes):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(error, match=message):
        pack_dataset([path], tmp_path / "out", bpe(), options(**changes))
    assert not (tmp_path / "out").exists()


LINE = b'{"text": "def add(first, second)"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LINE + b"{oops}\n", r"in\.jsonl, record 2: Expecting property name.*leave such records out \(--skip-bad\)"),
        (b"[1]\n", r"in\.jsonl, record 1: a list where a JSON object is wanted"),
        (
            b'{"body": "x", "id": 1}\n',
            r"record 1: no text in the field 'text', the record has body, id; name another with",
        ),
        (b'{"text": 5}\n', r"record 1: no text in the field 'text'"),
        (b'{"text": "\\ud800"}\n', r"record 1: character 0 of the text is the lone surrogate U\+D800"),
        (b'{"text": "\xff"}\n', r"record 1: 'utf-8' codec can't decode byte 0xff"),
        (b"[" * 100_000 + b"\n", r"record 1: maximum recursion depth exceeded"),
        (LINE + b'{"text": "' + b"x" * 300 + b'"}\n', r"in\.jsonl, record 2, is longer than 200 bytes"),
        (b"", r"no text in 1 files \(no records\)"),
        (b'{"text": " "}\n\n', r"no text in 1 files \(2 empty\); give files with text"),
    ],
)
def test_lines_that_are_no_documents(tmp_path, content, message):
    limit = 200 if "200 bytes" in message else 2**20
    refused(tmp_path, "in.jsonl", content, message, max_document_bytes=limit)


def test_bad_records_can_be_left_out(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b"{oops}\n" + LINE + b'{"text": 5}\n' + LINE)
    (tokens,) = pack_dataset([tmp_path / "in.jsonl"], tmp_path / "out", bpe(), options(skip_bad=True))
    assert tokens.num_documents == 2
    assert tokens.manifest.skipped == {"unreadable record": 2}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "in.jsonl.gz",
            gzip.compress(LINE * 99, mtime=0)[:-9],
            r"cannot read .*gz after \d+ bytes of it: Compressed file ended",
        ),
        ("in.jsonl.gz", LINE, r"cannot read .*gz after 35 bytes of it: Not a gzipped file"),
        (
            "in.jsonl.zst",
            zstandard.compress(LINE * 99)[:-3],
            r"zst after \d+ bytes of it: the last zstd frame has no end",
        ),
        ("in.jsonl.zst", LINE, r"zst after 35 bytes of it: zstd decompress\w* error: Unknown frame descriptor"),
        ("in.parquet", b"PAR1" + LINE, r"in\.parquet is no readable Parquet file: Parquet magic bytes not found"),
    ],
    ids=["gzip without its end", "no gzip", "Zstandard without its end", "no Zstandard", "no Parquet"],
)
def test_files_that_are_damaged(tmp_path, name, content, message):
    refused(tmp_path, name, content, message)


def test_a_line_without_end_is_refused_in_bounded_memory(tmp_path):
    """256 MiB of one byte in 8 KiB of zstd: the document's limit is met long before its end."""
    refused(
        tmp_path,
        "in.jsonl.zst",
        zstandard.ZstdCompressor(level=19).compress(b"x" * 2**28),
        "record 1, is longer than 1048576 bytes, the most that a document may have",
        max_document_bytes=2**20,
    )


def test_a_text_that_a_table_has_once_for_many_rows_is_not_in_memory_for_each(tmp_path):
    """30 MB of text in a file of some KiB."""
    parquet.write_table(pyarrow.table({"text": ["x" * 100_000] * 300}), tmp_path / "in.parquet")
    (file,) = find_inputs([tmp_path / "in.parquet"], max_document_bytes=2**20).files
    reader = records.Reader(file, one_document_a_line=False, max_bytes=2**20, columns=("text",))
    held = [pyarrow.total_allocated_bytes() for record in reader if len(record) > 100_000]
    assert len(held) == 300
    assert max(held) < 5_000_000


def test_tables_with_other_columns_or_rows_too_large(tmp_path):
    parquet.write_table(pyarrow.table({"body": ["x" * 5000, "y" * 5000], "id": [1, 2]}), tmp_path / "in.parquet")
    with pytest.raises(DataError, match=r"in\.parquet has the columns body, id, none of text; name the right one"):
        pack_dataset([tmp_path / "in.parquet"], tmp_path / "out", bpe())
    with pytest.raises(DataError, match=r"row group 0: 2 rows of \d+ bytes on average, a document is at most 100"):
        pack_dataset(
            [tmp_path / "in.parquet"], tmp_path / "out", bpe(), options(text_field="body", max_document_bytes=100)
        )
    table = {"text": ["x", None, "y"], "picture": [b"z" * 5000] * 3}
    parquet.write_table(pyarrow.table(table), tmp_path / "pictures.parquet")
    (tokens,) = pack_dataset(
        [tmp_path / "pictures.parquet"], tmp_path / "pictures", bpe(), options(max_document_bytes=100)
    )
    assert (tokens.num_documents, tokens.manifest.skipped) == (2, {"empty": 1})
    parquet.write_table(pyarrow.table({"text": ["x" * 5000, *["y"] * 500]}), tmp_path / "in.parquet")
    with pytest.raises(DataError, match=r"in\.parquet, record 1, is longer than 2000 bytes"):
        pack_dataset([tmp_path / "in.parquet"], tmp_path / "out", bpe(), options(max_document_bytes=2000))


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    message = r"needs zstandard, which is not installed; pip install 'yuanmoe\[train\]'"
    refused(tmp_path, "in.jsonl.zst", b"", message, MissingExtraError)
    refused(tmp_path, "in.parquet", b"", "needs pyarrow, which is not installed", MissingExtraError)


def test_trees_are_walked_by_suffix_and_what_is_left_out_is_counted(tmp_path):
    contents = {
        "b.py": b"b = 1\n",
        "a.py": b"\xef\xbb\xbfa = 1\r\n",
        "binary.py": b"MZ\0\0",
        "latin.py": "# caf\u00e9\n".encode("latin-1"),
        "empty.py": b" \n",
        "large.py": b"x" * 101,
        "picture.png": b"PNG",
        ".git/config.py": b"hidden = 1",
        "deep/er/c.PY": b"c = 1\n",
    }
    for name, content in contents.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(content)
    (tmp_path / "tree" / "link.py").symlink_to("b.py")
    how = options(suffixes=(".py",), max_document_bytes=100)
    (tokens,) = pack_dataset([tmp_path / "tree"], tmp_path / "out", bpe(), how)
    assert bpe().decode(tokens[:].tolist()) == "a = 1\n<eod>b = 1\n<eod>c = 1\n<eod>"
    assert tokens.manifest.skipped == {
        "binary": 1,
        "empty": 1,
        "larger than 100 B": 1,
        "not UTF-8": 1,
        "other suffix": 1,
        "the same file again": 1,
    }
    with pytest.raises(DataError, match=r"large\.py has 101 bytes, a document is at most 100 \(--max-document\)"):
        pack_dataset([tmp_path / "tree" / "large.py"], tmp_path / "out2", bpe(), how)
    with pytest.raises(
        DataError,
        match=r"no files to read \(9 other suffix\); name files, or folders with files of an",
    ):
        pack_dataset([tmp_path / "tree"], tmp_path / "out2", bpe(), options(suffixes=(".rs",)))
    with pytest.raises(DataError, match=r"cannot read .*nowhere: No such file or directory"):
        pack_dataset([tmp_path / "nowhere"], tmp_path / "out2", bpe())
    with pytest.raises(DataError, match=r"record 1: conversations are read from \.jsonl"):
        pack_dataset([tmp_path / "tree" / "a.py"], tmp_path / "out2", bpe(), options(format="chat"))


def test_a_name_that_is_no_text_is_a_name_all_the_same(tmp_path):
    path = write_lines(tmp_path / os.fsdecode(b"\xff.jsonl"), {"text": "one"})
    pack_dataset([path], tmp_path / "out", bpe())
    (line,) = (tmp_path / "out" / "sources.jsonl").read_text("ascii").splitlines()
    assert json.loads(line)["path"] == str(path)


def test_a_file_that_grows_meanwhile_is_noticed(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "in.jsonl", {"text": "one"})
    original = records.Reader._of_stream

    def grow(self, raw):
        yield from original(self, raw)
        with path.open("ab") as file:
            file.write(LINE)

    monkeypatch.setattr(records.Reader, "_of_stream", grow)
    with pytest.raises(DataError, match=r"in\.jsonl changed while it was read: 16 bytes before, 51 now"):
        pack_dataset([path], tmp_path / "out", bpe())


def test_a_worker_that_is_killed_or_fails():
    with pytest.raises(ResourceError, match="a worker process was ended from outside, most likely for want of memory"):
        list(map_ordered(make_dying, [1, 2, 3], workers=2))
    with pytest.raises(RuntimeError, match="ValueError: item 1"):
        list(map_ordered(make_failing, [1, 2, 3], workers=2))


def test_errors_of_workers_are_those_of_one(tmp_path):
    write_lines(tmp_path / "in.jsonl", *[{"text": "x"}] * 30, {"body": 1}, {"text": 2})
    with pytest.raises(DataError, match=r"in\.jsonl, record 31: no text in the field 'text'"):
        pack_dataset([tmp_path / "in.jsonl"], tmp_path / "out", bpe(), options(chunk_bytes=40), workers=2)
