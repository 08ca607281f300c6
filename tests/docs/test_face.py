"""The public names of the package: all there, each the object that its module defines, and none of them costs torch."""

import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Unpack, get_type_hints

import pytest

import yuanmoe
from yuanmoe.config import ModelConfig
from yuanmoe.engine.sampling import SamplingParams
from yuanmoe.options import AnswerOptions, ComputeOptions, SamplingOptions

ROOT = Path(yuanmoe.__file__).parent
TRAINING = {"train", "Run"} if not (ROOT / "train" / "run.py").exists() else set()
"""Until a run is an object of the library."""
NAMES = sorted(set(yuanmoe.__all__) - TRAINING)
PAGE = Path(__file__).parents[2] / "docs" / "api.md"


def program(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there_in_a_fresh_interpreter(name):
    assert program(f"from yuanmoe import {name}; print(callable({name}) or isinstance({name}, str))") == "True\n"


def test_importing_looks_up_nothing_large():
    found = program(
        "import sys, yuanmoe; dir(yuanmoe); print({'torch', 'numpy', 'rich', 'typer'} & sys.modules.keys())"
    )
    assert found == "set()\n"


@pytest.mark.parametrize("name", ["ModelConfig", "preset", "plan", "YuanError", "UsageError"])
def test_names_that_need_no_torch_bring_none(name):
    assert program(f"import sys; from yuanmoe import {name}; print('torch' in sys.modules)") == "False\n"


def test_names_are_few_and_all_in_the_document():
    assert len(yuanmoe.__all__) <= 26
    listed = set(re.findall(r"`(\w+)`", PAGE.read_text(encoding="utf-8")))
    assert set(yuanmoe.__all__) - {"__version__"} <= listed


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'yuanmoe' has no attribute 'lode'"):
        yuanmoe.lode  # noqa: B018


@pytest.mark.parametrize("first", ["import yuanmoe.plan.cost", "from yuanmoe.plan import cost", "pass"])
def test_plan_is_a_function_and_a_folder_whichever_is_met_first(first):
    code = (
        f"{first}\nimport yuanmoe\nfound = yuanmoe.plan('M32', bits=4, device='h200')\n"
        "import yuanmoe.plan.cost as cost\nfrom yuanmoe import plan\n"
        "assert plan is yuanmoe.plan and yuanmoe.plan.cost is cost\nprint(found.fits, found.memory.weights)"
    )
    assert program(code) == "True 21465837568\n"


def test_a_plan_says_what_would_fit():
    tight = yuanmoe.plan("yuan2-m32", bits=16, device="l40s")
    assert not tight.fits
    assert tight.memory.total > tight.device.memory_bytes
    assert "--bits 8" in [remedy.options for remedy in tight.remedies]
    assert tight.decode.bound > tight.decode.predicted > 0
    assert yuanmoe.plan("m32", bits=16, device="l40s", memory_bytes=2**40).fits


def test_options_are_those_of_the_objects_they_become():
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    assert set(SamplingOptions.__annotations__) == fields
    assert set(get_type_hints(AnswerOptions)) == fields | {"stop", "routing"}
    assert set(ComputeOptions.__annotations__) <= {field.name for field in dataclasses.fields(ModelConfig)}


@pytest.mark.parametrize("name", ["generate", "generate_batch", "stream", "chat", "fill"])
def test_answers_take_typed_options(name):
    (options,) = (
        each
        for each in inspect.signature(getattr(yuanmoe.LanguageModel, name)).parameters.values()
        if each.kind is inspect.Parameter.VAR_KEYWORD
    )
    assert options.annotation == Unpack[AnswerOptions]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "__version__"])
def test_every_name_has_a_docstring_of_its_own(name):
    module = importlib.import_module(f"yuanmoe.{yuanmoe._PLACES.get(name, 'errors')}")
    thing = getattr(module, yuanmoe._OWN_NAMES.get(name, name))
    assert len(inspect.getdoc(thing) or "") > 20


def test_a_wrong_option_is_refused_by_name():
    model = yuanmoe.load("small", device="cpu")
    with pytest.raises(TypeError, match="temprature"):
        model.generate("x = ", temprature=0.5)  # pyright: ignore[reportCallIssue]


def test_the_readme_of_the_library_runs(capsys):
    block = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert block
    exec(block[1], {})
    assert "def fibonacci" not in capsys.readouterr().err


def test_convert_and_quantize_work_from_the_face(tmp_path):
    written = yuanmoe.convert("small", tmp_path / "copy", dtype="float32")
    assert (written.path / "config.json").is_file()
