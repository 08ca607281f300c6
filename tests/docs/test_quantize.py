"""`yuanmoe quantize` as people and programs meet it, and every other command on what it wrote."""

import io
import json
import sys

import pytest

from small_lm import write_lm
from yuanmoe import load
from yuanmoe.checkpoint.quantize import quantize as quantizing
from yuanmoe.cli.main import main
from yuanmoe.evals import quality

TEXT = (
    "def add(a, b):\n    return a + b\n\n\nclass Stack:\n    def push(self, item):\n        self.all.append(item)\n" * 8
)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the program in this process: exit code, stdout, stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["yuanmoe", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "120")
        with pytest.raises(SystemExit) as exit_info:
            main()
        captured = capsys.readouterr()
        code = exit_info.value.code
        return (code if isinstance(code, int) else 0), captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def src(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_lm(folder / "small", hidden_size=32, head_dim=16, initializer_range=0.1)
    (folder / "text.txt").write_text(TEXT)
    return folder / "small"


@pytest.fixture
def text(src):
    return src.parent / "text.txt"


def last_line(out):
    return json.loads(out.splitlines()[-1])


def test_it_says_what_it_will_write_what_was_lost_and_what_that_does(tmp_path, src, text, run):
    dst = tmp_path / "dst"
    code, out, err = run("quantize", src, dst, "--group-size", 32, "--eval", text, "--threads", 1)
    result = last_line(out)
    assert (code, len(out.splitlines())) == (0, 1)
    said = [
        "small (native) by mse, groups of 32",
        "router      as it is",
        "disk: ",
        "to write; ",
        "memory to run it: ",
        "this machine has ",
        ": fits",
        "both models read",
        "What was lost",
        "By layer, dB (6 dB are one bit)",
        "The worst",
        "gate",
        "On text.txt: ",
        "the same likeliest token",
        "routing decisions changed",
    ]
    for part in said:
        assert part in err, part
    assert err.index("memory to run it") < err.index(f"{dst}: ") < err.index("What was lost") < err.index("On text.txt")
    measured = result["quality"]
    assert measured["scored_tokens"] == len(load(src).tokenizer.encode(TEXT))
    assert abs(measured["perplexity_change"]) < 0.1
    assert measured["perplexity_after"] == pytest.approx(
        measured["perplexity_before"] * (1 + measured["perplexity_change"])
    )
    assert 0.8 < measured["top1_agreement"] <= 1
    assert 0 <= measured["routing_changed"] < measured["routing_decisions"]
    assert len(measured["routing_changed_by_layer"]) == 2
    kept = json.loads((dst / "quantization.json").read_text())
    assert {key: result[key] for key in kept if key != "fingerprint"} == {
        key: value for key, value in kept.items() if key != "fingerprint"
    }


def test_again_it_shows_the_report(tmp_path, src, run):
    first = last_line(run("quantize", src, tmp_path / "dst", "--bits", 8)[1])
    code, out, err = run("quantize", src, tmp_path / "dst", "--bits", 8)
    assert code == 0
    assert "is whole already: the same command wrote it" in err
    assert "What was lost" in err
    again = last_line(out)
    assert (again.pop("shards"), again.pop("resumed_shards")) == (None, None)
    del again["seconds"]
    assert again.items() <= first.items()


def test_tokens_on_disk_and_a_text_calibrate(tmp_path, src, text, run):
    from yuanmoe.data.prepare.pack import pack_texts

    pack_texts([TEXT], tmp_path / "packed" / "tokens", load(src).tokenizer)
    reports = []
    for file in (text, tmp_path / "packed" / "tokens"):
        code, out, err = run("quantize", src, tmp_path / file.stem, "--calibration", file, "--calibration-tokens", 150)
        assert code == 0, err
        reports.append(last_line(out))
        assert reports[-1]["method"] == "gptq"
        record = json.loads((tmp_path / file.stem / "config.json").read_text())["quantization"]
        assert record["calibration"]["tokens"] == 150


WRONG = {
    "role": (["--role", "experts"], r"--role 'experts' is not ROLE=BITS; write it like embedding=8"),
    "bits": (["--bits", "5"], "5 bits; quantized weights have 4 or 8"),
    "text": (["--eval", "/nowhere"], "cannot read /nowhere: No such file or directory"),
    "calibration": (["--method", "mse", "--calibration", "TEXT"], "mse uses no calibration text"),
    "no calibration": (["--method", "gptq"], "gptq rounds by a text: give it one, --calibration FILE"),
    "empty": (["--eval", "EMPTY"], "has 1 tokens; at least 2 are needed, and some thousands tell more"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_call_is_refused_before_anything_is_written(tmp_path, src, text, run, options, message):
    (tmp_path / "empty").write_text("")
    files = {"TEXT": str(text), "EMPTY": str(tmp_path / "empty")}
    code, out, err = run("quantize", src, tmp_path / "dst", *(files.get(option, option) for option in options))
    assert (code, out) == (2, "")
    assert message in err
    assert not (tmp_path / "dst").exists()
    assert not (tmp_path / "dst.partial").exists()


def test_ctrl_c_says_how_to_go_on(tmp_path, src, text, run, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    dst = tmp_path / "dst"
    with monkeypatch.context() as patched:
        patched.setattr(quantizing, "run", interrupt)
        code, out, err = run("quantize", src, dst)
        assert (code, out) == (130, "")
        assert f"stopped; the same command goes on with what is finished in {dst}.partial" in err
    with monkeypatch.context() as patched:
        patched.setattr(quality, "quality", interrupt)
        code, out, err = run("quantize", src, dst, "--eval", text)
        assert (code, out) == (130, "")
        assert f"stopped; {dst} is whole, and the same command measures again" in err
    code, out, err = run("quantize", src, dst, "--eval", text)
    assert code == 0
    assert "is whole already" in err
    assert last_line(out)["quality"]["scored_tokens"] > 100


@pytest.fixture(scope="module")
def quantized(src, tmp_path_factory):
    dst = tmp_path_factory.mktemp("quantized") / "small4"
    quantizing.quantize_checkpoint(src, dst, bits=4)
    return dst


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8", "float32"])
def test_generate_and_the_library_run_it(src, quantized, run, kv_dtype):
    options = ("--max-new-tokens", 8, "--json", "--threads", 1)
    code, out, _ = run("generate", "--model", quantized, "def add(", "--kv-dtype", kv_dtype, *options)
    assert code == 0
    model = load(quantized, kv_dtype=kv_dtype)
    assert last_line(out)["ids"] == model.generate("def add(", max_new_tokens=8).ids
    assert model.precision.role_bits["experts"] == 4


def test_an_unknown_kv_dtype_is_refused(quantized, run):
    code, out, err = run("generate", "--model", quantized, "def", "--kv-dtype", "int4")
    assert (code, out) == (2, "")
    assert "unknown dtype 'int4'; known: float64, float32, float16, bfloat16, int8, fp64" in err


def test_the_other_commands_take_it(quantized, text, run):
    code, out, _ = run("plan", quantized, "--json", "--device", "rtx-4090", "--kv-dtype", "int8")
    plan = last_line(out)
    assert (code, plan["load"]["bits"], plan["load"]["kv_bits"]) == (0, 4, 8)
    assert plan["quantized"] == {"embedding": 8, "lfa": 8, "attention": 4, "experts": 4}
    assert plan["kv_bytes_per_token"] == 2 * 2 * 2 * (16 + 4)
    assert plan["memory"]["weights"] < plan["weight_bytes"]["8"]["total"]
    _, out, err = run("plan", quantized, "--device", "rtx-4090")
    assert "quantized, in bits: embedding 8, lfa 8, attention 4, experts 4" in err
    _, out, _ = run("plan", quantized, "--json", "--device", "rtx-4090", "--bits", "16")
    assert (last_line(out)["load"]["bits"], last_line(out)["quantized"]) == (16, None)
    code, out, _ = run("doctor", "--json", "--model", quantized)
    row = last_line(out)["models"][-1]
    assert (code, row["model"], row["bits"], row["fits"]) == (0, "small4", 4, True)
    code, out, _ = run("inspect", "--model", quantized, "--text", text, "--json", "--kv-dtype", "int8")
    assert (code, len(last_line(out)["layers"])) == (0, 2)
    code, out, _ = run("inspect", "--model", quantized, "--text", text, "--json", "--rope")
    assert (code, len(last_line(out)["settings"])) == (0, 4)
    code, out, err = run("verify", quantized)
    assert (code, last_line(out)["format"]) == (0, "native")
    assert "as written" in err
    code, out, err = run("quantize", quantized, quantized.parent / "again")
    assert code == 2
    assert "is quantized already; quantize the checkpoint that it was made from" in err


def test_chat_talks_with_it(quantized, run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    options = ("--max-new-tokens", 4, "--seed", 1, "--kv-dtype", "int8", "--threads", 1)
    code, _, err = run("chat", "--model", quantized, *options)
    assert code == 0
    assert "answer: " in err
