"""The table of measurements in both READMEs is what the tracked files say, and each file says where, when and how."""

import json
import re
import sys
from pathlib import Path

import pytest

from yuanmoe.bench.record import BEGIN, END, measurement_table, record, write_table
from yuanmoe.cli.main import main
from yuanmoe.errors import UsageError

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "measurements"
FILES = sorted(FOLDER.glob("*.json"))
FILE = {"place": 1, "row": {"en": ["{speed:.1f}", "b", "c"], "zh": ["a", "b", "c"]}, "figures": {"speed": 2.04}}


@pytest.mark.parametrize(("page", "language"), [("README.md", "en"), ("README_zh.md", "zh")])
def test_readmes_show_what_the_files_say(page, language):
    text = (ROOT / page).read_text(encoding="utf-8")
    shown = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()
    assert shown == measurement_table(FOLDER, language), (
        "yuanmoe bench table README.md README_zh.md brings it up to date"
    )
    assert len(shown.splitlines()) == 2 + len([file for file in FILES if "row" in json.loads(file.read_text("utf-8"))])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_says_where_when_and_how(file):
    found = json.loads(file.read_text(encoding="utf-8"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])
    assert found["machine"]["cpu"]
    assert found["command"]
    assert found["source"]


def test_a_recorded_result_keeps_its_row_and_gets_new_figures(tmp_path):
    file = tmp_path / "decode.json"
    file.write_text(json.dumps(FILE | {"figures": {"speed": "decode/0/rate"}}))
    assert record(tmp_path, "decode", "yuanmoe bench decode", {"decode": [{"rate": 3.14}]}) == file
    assert "| 3.1 | b | c |" in measurement_table(tmp_path, "en")
    assert json.loads(file.read_text())["machine"]["cores"] >= 1


def test_a_table_is_written_once_and_then_the_same(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(FILE))
    page = tmp_path / "PAGE.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert write_table(page, tmp_path)
    assert not write_table(page, tmp_path)
    assert "old" not in page.read_text()
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("after\n")


@pytest.mark.parametrize(
    ("figures", "message"), [({}, "a figure that is not there: 'speed'"), ({"speed": "a/b"}, 'nothing at "a/b"')]
)
def test_figures_that_lack_are_named(tmp_path, figures, message):
    (tmp_path / "one.json").write_text(json.dumps(FILE | {"figures": figures}))
    with pytest.raises(UsageError, match=message):
        measurement_table(tmp_path, "en")


def test_a_page_without_marks_is_left_alone(tmp_path):
    page = tmp_path / "PAGE.md"
    page.write_text("text\n")
    with pytest.raises(UsageError, match="has no place for the table"):
        write_table(page, tmp_path)


def test_the_command_records(tmp_path, monkeypatch, capsys):
    words = "bench layers --preset tiny --layers 1 --prompt-tokens 8 --runs 1 --no-peer --threads 1 --record"
    monkeypatch.setattr(sys, "argv", ["yuanmoe", *words.split(), str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    found = json.loads((tmp_path / "layers.json").read_text())
    assert found["result"]["preset"] == "tiny"
    assert found["command"].startswith("yuanmoe bench layers --preset tiny")
    assert "recorded in" in capsys.readouterr().err
