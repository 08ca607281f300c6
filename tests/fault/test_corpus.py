"""Sources of every kind that lies about in folders: what becomes a document, in which order, and what does not."""

import itertools
import logging
from pathlib import Path

import pytest

from yuanmoe.data.sources.python_sources import Document, iter_python_sources, stdlib_documents
from yuanmoe.errors import UsageError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    files = {
        "b.py": b"b = 1\n",
        "a.py": b"\xef\xbb\xbfa = 1\r\n",
        "same_as_b.py": b"b = 1\n",
        "latin.py": "# caf\u00e9\n".encode("latin-1"),
        "empty.py": b" \n",
        "large.py": b"x" * 101,
        "notes.txt": b"no source\n",
        "sub/c.py": "c = '\u4e2d'\n".encode(),
        "test/t.py": b"t = 1\n",
        "site-packages/s.py": b"s = 1\n",
        ".hidden/h.py": b"h = 1\n",
        "folder.py/d.py": b"d = 1\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "endless.py").symlink_to("/dev/zero")
    (tmp_path / "link.py").symlink_to(tmp_path / "notes.txt")
    return tmp_path


def test_what_becomes_a_document(root: Path) -> None:
    assert list(iter_python_sources([root], max_file_bytes=100)) == [
        Document(name="a.py", text="a = 1\n"),
        Document(name="b.py", text="b = 1\n"),
        Document(name="folder.py/d.py", text="d = 1\n"),
        Document(name="sub/c.py", text="c = '\u4e2d'\n"),
    ]


def names(root: Path, **choices) -> list[str]:
    return [document.name for document in iter_python_sources([root], **choices)]


def test_tests_and_large_files_when_asked_for(root: Path) -> None:
    assert names(root, skip_tests=False)[-2:] == ["sub/c.py", "test/t.py"]
    assert "large.py" in names(root, max_file_bytes=101)


@pytest.mark.parametrize(("max_bytes", "expected"), [(0, []), (15, ["a.py"]), (16, ["a.py", "b.py"])])
def test_a_limit_for_all(root: Path, max_bytes: int, expected: list[str]) -> None:
    """a.py has 10 bytes, b.py 6."""
    assert names(root, max_bytes=max_bytes) == expected


def test_the_same_root_twice_gives_nothing_new(root: Path) -> None:
    assert list(iter_python_sources([root, root])) == list(iter_python_sources([root]))


def test_an_unreadable_file_is_left_out_with_a_word(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def read_bytes(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with caplog.at_level(logging.WARNING):
        assert names(root) == []
    assert "left out: [Errno 13] Permission denied" in caplog.text


def test_a_root_that_is_no_folder(root: Path) -> None:
    with pytest.raises(UsageError, match=r"a\.py is not a folder; give folders that hold \.py files"):
        list(iter_python_sources([root / "a.py"]))


def test_standard_library() -> None:
    documents = list(stdlib_documents(max_bytes=200_000))
    assert documents == list(stdlib_documents(max_bytes=200_000))
    assert 50_000 < sum(len(document.text.encode()) for document in documents) <= 200_000
    assert [document.name for document in documents] == sorted(
        (document.name for document in documents), key=in_walk_order
    )
    assert not any("/test" in document.name for document in itertools.islice(stdlib_documents(), 200))


def in_walk_order(name: str) -> tuple[tuple[bool, str], ...]:
    """Files of a folder come before its folders."""
    *folders, file = name.split("/")
    return (*((True, folder) for folder in folders), (False, file))
