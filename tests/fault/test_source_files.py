"""Files and folders as they are on disks: names in capitals, links, pipes, copies, and what may not be read."""

import gzip
import os

import pytest
import zstandard

from small_tokenizers import bpe
from yuanmoe.data.prepare.pack import pack_dataset
from yuanmoe.data.sources import inputs
from yuanmoe.data.sources.inputs import find_inputs
from yuanmoe.errors import DataError

LINE = b'{"text": "the fox"}\n'


def found(*paths, **changes):
    inputs = find_inputs(paths, max_document_bytes=2**20, **changes)
    return [file.name for file in inputs.files], dict(inputs.skipped)


def fill(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


def test_suffixes_in_capitals(tmp_path):
    folder = fill(
        tmp_path / "in",
        **{"A__JSONL__GZ": gzip.compress(LINE), "B__Jsonl__ZST": zstandard.compress(LINE), "C__NDJSON": LINE},
        **{"D__PY__GZ": gzip.compress(b"the fox")},
    )
    (tokens,) = pack_dataset([folder], tmp_path / "out", bpe())
    assert bpe().decode(tokens[:].tolist()) == "the fox<eod>" * 4
    assert tokens.manifest.skipped == {}
    assert found(folder, suffixes=[".PY"])[0] == ["in/D.PY.GZ"]
    assert found(folder, suffixes=[".jsonl.gz"])[0] == ["in/A.JSONL.GZ", "in/B.Jsonl.ZST"], "as .jsonl"


def test_a_file_is_read_once_however_often_it_is_met(tmp_path):
    folder = fill(tmp_path / "in", a__jsonl=LINE, b__jsonl=LINE)
    os.link(folder / "a.jsonl", folder / "c.jsonl")
    names, skipped = found(folder / "b.jsonl", folder, folder / "b.jsonl", folder)
    assert [name.rpartition("/")[2] for name in names] == ["b.jsonl", "a.jsonl"]
    assert skipped == {"the same file again": 6}
    (tokens,) = pack_dataset([folder / "a.jsonl", folder], tmp_path / "out", bpe())
    assert (tokens.num_documents, tokens.manifest.skipped) == (2, {"the same file again": 2})


def test_pipes_are_refused_with_a_way_out(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(DataError, match=r"is a pipe or a device, .* write its output to a file first \(\.gz and"):
            found(path)
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "a.jsonl").write_bytes(LINE)
    assert found(tmp_path)[1] == {"other suffix": 1, "no regular file": 1}


def test_a_folder_of_a_hub_cache_is_read_through_its_links(tmp_path):
    repository = tmp_path / "datasets--a--b"
    fill(repository / "blobs", **{"0123": LINE, "4567": LINE})
    (repository / "snapshots" / "abc" / "data").mkdir(parents=True)
    (repository / "snapshots" / "abc" / "train.jsonl").symlink_to("../../blobs/0123")
    (repository / "snapshots" / "abc" / "data" / "more.jsonl").symlink_to("../../../blobs/4567")
    assert found(repository / "snapshots" / "abc") == (["abc/train.jsonl", "abc/data/more.jsonl"], {})
    (tmp_path / "link").symlink_to(repository / "snapshots" / "abc" / "data")
    assert found(tmp_path / "link") == (["link/more.jsonl"], {})
    assert len(found(repository)[0]) == 2


def test_links_neither_leave_the_folder_nor_go_in_circles(tmp_path):
    (tmp_path / "secret.txt").write_text("key")
    folder = fill(tmp_path / "in", a__txt=b"a")
    (folder / "b.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "c.txt").symlink_to("nowhere.txt")
    (folder / "d.txt").symlink_to("d.txt")
    (folder / "e.txt").symlink_to("a.txt")
    (folder / "f").symlink_to(folder)
    assert found(folder) == (
        ["in/a.txt"],
        {"link to a folder": 1, "link out of the folder": 1, "broken link": 2, "the same file again": 1},
    )


def test_what_may_not_be_read_is_refused_at_the_start_or_counted(tmp_path, monkeypatch):
    """Whoever runs the tests may be allowed to read everything, so the system's answers are made up."""
    folder = fill(tmp_path / "in", a__txt=b"a", b__txt=b"b")
    fill(folder / "closed", c__txt=b"c")
    scan, access = os.scandir, os.access

    def scandir(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scan(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        with pytest.raises(DataError, match=r"cannot read the folder .*closed: Permission denied; allow it, or leave"):
            found(folder)
        assert found(folder, skip_bad=True) == (["in/a.txt", "in/b.txt"], {"unreadable folder": 1})
    monkeypatch.setattr(inputs.os, "access", lambda path, mode: path.name != "b.txt" and access(path, mode))
    with pytest.raises(DataError, match=r"cannot read .*b\.txt: permission denied; allow it, or leave out"):
        found(folder)
    assert found(folder, skip_bad=True)[1] == {"unreadable file": 1}


def test_empty_files_are_no_documents(tmp_path):
    folder = fill(tmp_path / "in", a__txt=b"", b__jsonl=b"", c__jsonl__gz=gzip.compress(b""), d__jsonl=LINE)
    (tokens,) = pack_dataset([folder], tmp_path / "out", bpe())
    assert (tokens.num_documents, tokens.manifest.source_files, tokens.manifest.skipped) == (1, 4, {"empty": 1})
