"""Stages are done once, and again exactly when something they depend on changed."""

import json

import pytest

from yuanmoe.cli.demo.done import RECORD, FinishedStages
from yuanmoe.errors import ResourceError


def run(folder, *, first=1, second=1, fresh=False, fail=None):
    """Two stages; the names of those that worked, and what the second found."""
    worked = []

    def work(name):
        def do():
            if name == fail:
                raise KeyboardInterrupt
            worked.append(name)
            (folder / name).write_text("done")
            return {"by": name, "first": first, "second": second}

        return do

    stages = FinishedStages(folder, fresh=fresh)
    for name, settings in (("a", {"value": first}), ("b", {"value": second})):
        stage = stages.run(name, settings, [folder / name], work(name))
        assert stage.reused == (name not in worked)
    return worked, stage.summary


def test_what_is_done_is_kept(tmp_path):
    folder = tmp_path / "new" / "demo"
    worked, found = run(folder)
    assert worked == ["a", "b"]
    assert run(folder) == ([], found)


@pytest.mark.parametrize(("changes", "again"), [({"first": 2}, ["a", "b"]), ({"second": 2}, ["b"])])
def test_a_change_reaches_what_depends_on_it(tmp_path, changes, again):
    run(tmp_path)
    worked, found = run(tmp_path, **changes)
    assert worked == again
    assert changes.items() <= found.items()
    assert run(tmp_path, **changes)[0] == []


def test_fresh_does_everything_again(tmp_path):
    run(tmp_path)
    assert run(tmp_path, fresh=True)[0] == ["a", "b"]
    assert run(tmp_path)[0] == []


def test_lost_outputs_are_made_again(tmp_path):
    run(tmp_path)
    (tmp_path / "b").unlink()
    assert run(tmp_path)[0] == ["b"]


@pytest.mark.parametrize(("fail", "left"), [("a", ["a", "b"]), ("b", ["b"])])
def test_an_interrupted_stage_is_done_again_and_no_other(tmp_path, fail, left):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, fail=fail)
    assert run(tmp_path)[0] == left


def test_an_interrupted_change_leaves_nothing_that_looks_done(tmp_path):
    run(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, second=2, fail="b")
    assert run(tmp_path)[0] == ["b"]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1}', '{"a": {"fingerprint": 1}}', "null"])
def test_a_damaged_record_counts_as_none(tmp_path, content):
    (tmp_path / RECORD).write_text(content)
    assert run(tmp_path)[0] == ["a", "b"]
    assert json.loads((tmp_path / RECORD).read_text()).keys() == {"a", "b"}


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"cannot write .*file.*make room or choose another folder"):
        run(tmp_path / "file")
