"""The table of trips in docs/architecture.md lists exactly the files that a traced run enters, in their order."""

import json
import re
import shutil
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest

from small_lm import write_lm
from small_runs import write_tokens
from yuanmoe.ops import native

TESTS = Path(__file__).resolve().parents[1]
PAGE = TESTS.parent / "docs" / "architecture.md"
TITLES = {
    "generate": "A prompt through `generate`",
    "request": "A request to its first chunk",
    "convert": "`convert`",
    "quantize": "`quantize`",
    "train": "`train`, to the end of the first step",
}
SEVERAL_THREADS = {"request"}
"""Trips whose files have no fixed order: the HTTP side and the engine run at the same time."""


def row(name: str, files: list[str]) -> str:
    """The line of the table: neighbouring files of one folder together, without `.py`."""
    rooms = [
        f"`{room or 'yuanmoe'}`: {', '.join(Path(file).stem for file in group)}"
        for room, group in groupby(files, key=lambda file: str(Path(file).parent).replace(".", ""))
    ]
    return f"| {TITLES[name]} | {len(files)} | {'; '.join(rooms)} |"


def listed(name: str) -> list[str]:
    """The files that the page lists for a trip."""
    match = re.search(
        rf"^\| {re.escape(TITLES[name])} \| (\d+) \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert match, f"docs/architecture.md has no row for {name}"
    found = []
    for part in match[2].split("; "):
        room, stems = part.split("`: ")
        folder = room.strip("`")
        found += [f"{stem}.py" if folder == "yuanmoe" else f"{folder}/{stem}.py" for stem in stems.split(", ")]
    assert len(found) == int(match[1]), f"the row of {name} gives another number than it lists"
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("trips")
    write_lm(made / "model")
    write_tokens(made / "tokens")
    shutil.copytree(TESTS / "golden_data" / "moe-tiny", made / "official")
    return made


@pytest.mark.slow
@pytest.mark.skipif(not native.available(), reason="the table is that of compiled kernels; build them (`make setup`)")
@pytest.mark.parametrize("name", list(TITLES))
def test_the_table_lists_the_files_of_a_trip(name: str, folder: Path) -> None:
    command = [sys.executable, str(TESTS / "trips.py"), name, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    files = json.loads(done.stdout.splitlines()[-1])
    in_table, entered = listed(name), files
    if name in SEVERAL_THREADS:
        in_table, entered = sorted(in_table), sorted(entered)
    assert in_table == entered, f"docs/architecture.md needs this row now:\n{row(name, files)}"
