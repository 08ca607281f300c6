"""`yuanmoe train` from the command line to a model that answers, and what the folder of a run shows."""

import builtins
import io
import json
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

import yuanmoe
from small_runs import TINY, arguments, write_tokens
from yuanmoe.checkpoint.open import open_checkpoint
from yuanmoe.cli import main
from yuanmoe.reports.training_page import Series, chart, run_page
from yuanmoe.storage.run_folder import RECIPE, SAMPLES, read_lines, read_metrics
from yuanmoe.train.board import Board
from yuanmoe.train.recipe.recipes import named
from yuanmoe.train.recipe.settings import flat, override

DOCUMENTED = ("nano", "small", "ablation-826m", "m32-pretrain", "m32-sft", "m32-lora")
DOCUMENT = Path(__file__).parents[2] / "docs" / "training.md"


def call(args):
    """What people saw, and the JSON of the last line."""
    seen, out = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(seen), redirect_stdout(out):
        patch.setattr("sys.argv", ["yuanmoe", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            main.main()
    assert ended.value.code in (0, None), seen.getvalue()
    return seen.getvalue(), json.loads(out.getvalue().splitlines()[-1])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, *call(arguments(data, folder))


def test_from_text_to_a_model_in_every_layout_and_on_from_there(run, data, tmp_path):
    folder, seen, result = run
    assert (result["steps"], result["tokens"], result["interrupted"]) == (20, 1280, False)
    assert "optimizer.learning_rate = 0.004" in seen
    assert seen.index("optimizer.learning_rate") < seen.index("tokens, loss")
    resolved = override(named("nano"), TINY).to_dict()
    assert json.loads((folder / RECIPE).read_text()) == resolved
    answer = yuanmoe.load(result["checkpoint"]).generate("def", max_new_tokens=3)
    call(["convert", result["checkpoint"], tmp_path / "official", "--to", "official"])
    assert open_checkpoint(tmp_path / "official").format == "official"
    assert yuanmoe.load(tmp_path / "official").generate("def", max_new_tokens=3).ids == answer.ids
    more = ["train", "nano", "--data", data, "--out", tmp_path / "more", "--init", tmp_path / "official"]
    settings = ("data.sequence_length=32", "data.batch_size=4", "schedule.max_tokens=256", "run.dtype=bfloat16")
    call([*more, "--threads", 1, *(part for setting in settings for part in ("--set", setting))])
    made = json.loads((tmp_path / "more" / RECIPE).read_text())
    assert made["model"]["hidden_size"] == 32
    assert read_metrics(tmp_path / "more")[0]["loss"] < read_metrics(folder)[0]["loss"] - 0.5
    started = open_checkpoint(tmp_path / "more" / "checkpoints" / "step-2")
    assert str(started.dtype) == "torch.bfloat16"
    assert started.origin.config == open_checkpoint(tmp_path / "official").origin.config


def test_the_folder_of_a_run_shows_how_it_went(run):
    folder, _, result = run
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, 21))
    names = {"max_over_mean", "coefficient_of_variation", "entropy", "effective_experts", "dead_experts"}
    assert all(set(layer) == names for line in lines for layer in line["balance"])
    assert [line["step"] for line in lines if "load" in line] == [10, 20]
    assert [(sample["step"], sample["prompt"]) for sample in read_lines(folder / SAMPLES)] == [
        (10, "def add"),
        (20, "def add"),
    ]
    assert list((folder / "tensorboard").iterdir())
    page = (folder / "report.html").read_text()
    assert page == run_page(folder)
    for title in ("Loss", "Learning rate", "Throughput", "Load of every expert", "Samples", "Recipe", "Environment"):
        assert title in page
    assert page.count('<svg class="curve"') == 4
    assert page.count('<svg class="load"') == 1
    assert f"{lines[-1]['heldout_bits_per_byte']:.3f} bits a byte" in page
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)|https?://|@import|url\(", page)
    assert result["report"] == str(folder / "report.html")


def test_text_in_a_report_is_text(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    with (folder / SAMPLES).open("a") as file:
        file.write(json.dumps({"step": 30, "prompt": "<script>", "text": "</pre><img src=x>"}) + "\n")
    page = run_page(folder)
    assert "<script>&" not in page
    assert "&lt;script&gt;" in page
    assert "<img" not in page


def test_a_chart_holds_every_point():
    points = [(float(step), float((step * 7) % 5)) for step in range(1, 50)]
    drawn = chart([Series("one", points), Series("two", [(3.0, 9.0)])])
    places = [tuple(map(float, pair.split(","))) for pair in re.findall(r"[\d.]+,[\d.]+", drawn)]
    assert len(places) == 50
    assert all(0 <= x <= 760 and 0 <= y <= 200 for x, y in places)
    flat_line = chart([Series("one", [(1.0, 2.0)])])
    assert "nan" not in flat_line


def test_without_tensorboard_a_run_says_so_once(monkeypatch, tmp_path):
    found = builtins.__import__

    def without(name, *args, **options):
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return found(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    said = []
    with Board(tmp_path, said.append) as board:
        board.log(1, {"loss": 1.0})
        board.log(2, {"loss": 1.0})
    assert said == ["TensorBoard is not installed, so it gets no curves: pip install 'yuanmoe[train]'"]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_recipe_can_be_shown(name):
    seen, result = call(["train", name, "--show", "--set", "run.seed=5"])
    assert result["recipe"] == override(named(name), ["run.seed=5"]).to_dict()
    for key in flat(result["recipe"]):
        assert f"  {key} = " in seen


def test_a_longer_context_is_an_option():
    _, result = call(["train", "m32-pretrain", "--show", "--context", "16384"])
    assert result["recipe"]["model"]["rope_theta"] == 40_890
    assert result["recipe"]["data"]["sequence_length"] == 16_384


def test_the_document_names_what_there_is():
    known = set(flat(named("nano").to_dict()))
    found = set(re.findall(r"(?<!/)\b((?:model|data|optimizer|schedule|balance|run)\.[a-z_]+)\b", DOCUMENT.read_text()))
    assert found - known == {"model.safetensors", "data.md"}
    assert len(found & known) > 10
    for name in DOCUMENTED:
        assert f"| `{name}` |" in DOCUMENT.read_text()
