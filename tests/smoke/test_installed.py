"""What must work wherever the package is installed, with nothing but what it requires: `make wheel` runs this alone."""

import importlib
import pkgutil
import subprocess
import sys
from importlib.metadata import version
from importlib.resources import files

import pytest

import yuanmoe
from yuanmoe.errors import MissingExtraError


def command(*arguments):
    words = [sys.executable, "-m", "yuanmoe", *arguments]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)


def test_the_shipped_model_answers():
    model = yuanmoe.load("small", device="cpu")
    answer = model.generate("def read_lines(path):", max_new_tokens=8, temperature=0.0)
    assert len(answer.ids) == 8
    assert answer.text == model.generate("def read_lines(path):", max_new_tokens=8, temperature=0.0).text


def test_the_command_knows_its_version():
    result = command("--version")
    assert (result.returncode, result.stdout) == (0, f"yuanmoe {version('yuanmoe')}\n"), result.stderr


@pytest.mark.parametrize("words", ["generate def --max-new-tokens 4", "plan yuan2-m32", "doctor", "train --help"])
def test_commands_end_well(words):
    result = command(*words.split())
    assert result.returncode == 0, result.stderr
    assert result.stdout


@pytest.mark.parametrize("name", ["py.typed", "small/MODEL_CARD.md", "small/config.json"])
def test_what_is_no_program_came_along(name):
    assert (files("yuanmoe") / name).is_file()


def test_every_module_can_be_imported_or_names_the_extra_that_it_needs():
    unexplained = []

    def import_or_explain(name):
        try:
            importlib.import_module(name)
        except MissingExtraError as error:
            if "yuanmoe[" not in str(error):
                unexplained.append(name)

    found = list(pkgutil.walk_packages(yuanmoe.__path__, "yuanmoe.", onerror=import_or_explain))
    names = [each.name for each in found if each.name.rpartition(".")[2] not in ("__main__", "libyuanmoe")]
    assert len(names) > 100
    for name in names:
        import_or_explain(name)
    assert not unexplained
