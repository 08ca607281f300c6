"""Which installed packages may be trained on, and which of their files."""

from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from yuanmoe.data.sources.packages import Package, installed_packages, is_permissive


def installed(root: Path, metadata: str, files: dict[str, str]) -> Package:
    folder = root / "thing-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.4\nName: thing\nVersion: 1.0\n{metadata}\n")
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (folder / "RECORD").write_text("".join(f"{name},,\n" for name in files))
    (package,) = installed_packages([PathDistribution(folder)])
    return package


@pytest.mark.parametrize(
    ("metadata", "permissive"),
    [
        ("License-Expression: MIT", True),
        ("License-Expression: Apache-2.0 WITH LLVM-exception AND (BSD-3-Clause OR MIT)", True),
        ("License-Expression: MPL-2.0 AND MIT", False),
        ("Classifier: License :: OSI Approved :: ISC License (ISCL)", True),
        ("License: MIT\nClassifier: License :: OSI Approved :: GNU General Public License v3 (GPLv3)", False),
        ("Classifier: License :: OSI Approved", False),
        ("License: BSD", True),
        ("", False),
    ],
)
def test_only_named_permissive_licences_pass(tmp_path: Path, metadata: str, permissive: bool) -> None:
    assert installed(tmp_path, metadata, {"thing/a.py": "a = 1\n"}).permissive is permissive


def test_every_licence_of_an_expression_counts() -> None:
    assert is_permissive("MIT AND PSF-2.0")
    assert not is_permissive("MIT OR GPL-3.0-only")


def test_tests_copies_and_generated_code_are_left_out(tmp_path: Path) -> None:
    names = ["thing/a.py", "thing/tests/b.py", "thing/_vendor/c.py", "thing/d_pb2.py", "thing/e.txt"]
    package = installed(tmp_path, "License-Expression: MIT", dict.fromkeys(names, "x = 1\n"))
    assert [document.name for document in package.documents(max_bytes=100)] == ["thing/a.py"]


def test_a_sample_keeps_within_its_bytes_and_repeats(tmp_path: Path) -> None:
    files = {f"thing/{name}.py": f"{name} = 1\n" for name in "abcdef"}
    package = installed(tmp_path, "License-Expression: MIT", files)
    first, second = ([each.name for each in package.documents(max_bytes=15)] for _ in range(2))
    assert first == second
    assert len(first) == 2
