"""The model that comes with the package: its files, its card against them, and what it knows."""

import json
import math
import os
import re
import shlex
import sys

import pytest
import torch

import yuanmoe
from yuanmoe.checkpoint.open import open_checkpoint
from yuanmoe.checkpoint.write.verify import verify_checkpoint
from yuanmoe.cli.main import main
from yuanmoe.errors import CheckpointError
from yuanmoe.plan import cost
from yuanmoe.shipped import CARD, model_folder, small_folder
from yuanmoe.storage.run_folder import RECIPE
from yuanmoe.train.recipe.recipes import CODE_PROMPTS, small
from yuanmoe.train.recipe.settings import override

MIB = 1 << 20

# Of Python's contextlib, 3.11.
TEXT = '''class ExitStack(_BaseExitStack, AbstractContextManager):
    """Context manager for dynamic management of a stack of exit callbacks.

    For example:
        with ExitStack() as stack:
            files = [stack.enter_context(open(fname)) for fname in filenames]
            # All opened files will automatically be closed at the end of
            # the with statement, even if attempts to open files later
            # in the list raise an exception.
    """

    def __enter__(self):
        return self

    def __exit__(self, *exc_details):
        received_exc = exc_details[0] is not None
'''


@pytest.fixture(scope="module")
def card():
    return (small_folder() / CARD).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def lm():
    return yuanmoe.load("small", device="cpu")


def row(card, name):
    """The first number of a row of the card's table."""
    found = re.search(rf"^\| {re.escape(name)} \|[^|\d]*([\d,.]*\d)", card, re.MULTILINE)
    assert found, name
    return float(found[1].replace(",", ""))


def test_it_is_whole_and_small():
    found = verify_checkpoint(small_folder())
    assert found.hashed_bytes > found.nbytes > 0
    assert sum(file.stat().st_size for file in small_folder().iterdir()) < 25 * MIB


def test_the_card_has_the_parameters_and_bytes_of_the_files(card):
    config = open_checkpoint(small_folder()).config
    total, active = sum(cost.parameters(config).values()), sum(cost.active_parameters(config).values())
    assert f"{total:,} parameters, {active:,} of them at work for a token" in card
    weights = sum(file.stat().st_size for file in small_folder().glob("*.safetensors"))
    assert row(card, "weights as shipped") == weights


def test_the_cards_commands_make_the_recipe_it_was_trained_by(card):
    recipe = json.loads((small_folder() / RECIPE).read_text())
    words = shlex.split(next(line for line in card.splitlines() if " yuanmoe train " in line.replace("/", " ")))
    settings = [words[index + 1] for index, word in enumerate(words) if word == "--set"]
    assert settings
    assert override(small(), settings).to_dict() == recipe
    assert recipe["model"] == open_checkpoint(small_folder()).config.to_dict()
    assert row(card, "tokens learned from") <= recipe["schedule"]["max_tokens"] + 4096


def test_the_cards_bits_are_those_of_its_quantizer(card):
    roles = json.loads((small_folder() / "config.json").read_text())["quantization"]["roles"]
    for role, bits in roles.items():
        assert f"--role {role}={bits}" in card or f"--bits {bits} " in card
    assert 0 < row(card, "held-out bits per byte, in float32") < row(card, "held-out bits per byte, as shipped") < 2


def test_the_sources_in_the_card_add_up(card):
    rows = re.findall(r"^\| (.*?) \|(.*?)\|(.*?)\| ([\d,]+) \| ([\d,]+) \|$", card, re.MULTILINE)
    numbers = [[int(cell.replace(",", "")) for cell in cells[3:]] for cells in rows]
    assert all(licence.strip() for _, version, licence, *_ in rows if version.strip())
    assert numbers[-1] == [sum(column) for column in zip(*numbers[:-1], strict=True)]


def test_it_knows_python(lm):
    nats = -sum(lm.score(TEXT))
    bits = nats / math.log(2) / len(TEXT.encode())
    assert bits < 1.3, f"{bits:.2f} bits a byte"
    english = -sum(lm.score("Il pleure dans mon coeur comme il pleut sur la ville.")) / math.log(2) / 54
    assert english > bits


def test_greedy_answers_do_not_depend_on_threads(lm):
    before = torch.get_num_threads()
    answers = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        answers.append([lm.generate(prompt, max_new_tokens=32).ids for prompt in CODE_PROMPTS])
    torch.set_num_threads(before)
    assert answers[0] == answers[1]


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["yuanmoe", *arguments])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code


def test_generate_without_a_model_says_what_it_takes(monkeypatch, capfd):
    call(monkeypatch, "generate", "def read_lines(path):", "--max-new-tokens", "8")
    out, err = capfd.readouterr()
    assert out.strip()
    assert f"no --model: the small one that comes with yuanmoe completes Python ({small_folder() / CARD})" in err


def test_its_name_works_where_a_model_is_named_and_a_folder_of_that_name_goes_first(monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, "verify", "small")
    assert json.loads(capfd.readouterr().out)["path"] == str(small_folder())
    call(monkeypatch, "generate", "--model", "small", "def f(", "--max-new-tokens", "4", "--json")
    assert json.loads(capfd.readouterr().out)["model"] == str(small_folder())
    os.mkdir("small")
    assert str(model_folder("small")) == "small"
    with pytest.raises(CheckpointError, match=r"small/config\.json is missing"):
        yuanmoe.load("small")
