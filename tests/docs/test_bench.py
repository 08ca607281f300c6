"""`yuanmoe bench` on small models: what it prints, what it counts, and what it refuses before it starts."""

import json
from typing import Any

import pytest
import torch

from small_lm import write_lm
from yuanmoe.bench import decode as study
from yuanmoe.bench.decode import DecodeSettings, check_decode_settings
from yuanmoe.bench.products import layer_beside_torch
from yuanmoe.bench.synthetic import synthetic_model
from yuanmoe.checkpoint.formats.packed_weight import policy
from yuanmoe.checkpoint.quantize.quantize import quantize_checkpoint
from yuanmoe.cli.main import main
from yuanmoe.errors import ResourceError
from yuanmoe.ops import native
from yuanmoe.plan import cost
from yuanmoe.presets import preset

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no compiled kernels: {native.reason()}")
SMALL = ("--contexts", "8,16", "--prompts", "4", "--runs", "1", "--threads", "1", "--json")
RATE = {"median", "min", "max"}


@pytest.fixture(autouse=True)
def _few_bytes(monkeypatch):
    monkeypatch.setattr("yuanmoe.bench.products.ROTATION_BYTES", 1 << 20)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the program in this process: exit code, the JSON of its last line if there is one, stderr."""

    def call(*arguments: str, command: str = "decode") -> tuple[Any, dict[str, Any], str]:
        monkeypatch.setattr("sys.argv", ["yuanmoe", "bench", command, *arguments])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as exit_info:
            main()
        out, err = capsys.readouterr()
        return exit_info.value.code or 0, json.loads(out.splitlines()[-1]) if out else {}, err

    return call


def test_a_preset_is_measured_with_everything_in_one_line(run):
    code, result, _ = run("--preset", "tiny", "--layers", "3", "--batch", "1,2", *SMALL)
    assert code == 0
    assert {"cpu", "load", "torch", "variant", "threads", "resident_bytes", "weights"} <= result.keys()
    assert (result["model"], result["bits"], result["layers"], result["kv_dtype"]) == ("tiny", 4, 3, "bf16")
    assert result["role_bits"] == {"embedding": 8, "lfa": 8, "attention": 4, "experts": 4}
    assert result["read_bytes_per_s"].keys() == RATE
    assert [(report["batch"], report["context"]) for report in result["decode"]] == [(1, 8), (1, 16), (2, 8)]
    for report in result["decode"]:
        assert report["tokens_per_s"].keys() == report["bytes_per_s"].keys() == RATE
        assert report["tokens_per_s"]["median"] == pytest.approx(report["batch"] / report["median_s"])
        assert report["share_of_read_bandwidth"] > 0
        assert 2 <= report["experts_read"] <= 2 * report["batch"]
    config = preset("tiny", num_hidden_layers=3)
    expected = cost.decode_bytes(config, policy(config, 4), context=8, batch=2)
    assert result["decode"][2]["bytes"] == expected
    assert [report["experts_read_if_uniform"] for report in result["decode"]] == [2, 2, 3.5]
    (prefill,) = result["prefill"]
    assert prefill["tokens"] == 4
    assert prefill["operations"] == cost.prefill_flops(config, 4)
    assert prefill["time_to_first_token_s"]["median_s"] == pytest.approx(4 / prefill["tokens_per_s"]["median"])
    for name in ("decode", "prefill"):
        beside = result["beside_torch_int4"][name]
        assert beside["speed_against_torch"] == pytest.approx(beside["yuanmoe"]["median"] / beside["torch"]["median"])


def test_people_see_tables_with_the_bounds(run):
    code, _, err = run("--preset", "tiny", "--bits", "8", "--kv-dtype", "int8", *SMALL[:-1])
    assert code == 0
    for said in ("decoding, 2 layers, 8 bits, 1 threads", "read bandwidth ", "resident memory ", "of torch's int4"):
        assert said in err
    if native.variant() != "portable":
        assert "8-bit multiply-adds in registers" in err


def test_a_quantized_checkpoint_is_measured_as_it_is_stored(run, tmp_path):
    write_lm(tmp_path / "whole")
    quantize_checkpoint(tmp_path / "whole", tmp_path / "few", bits=4, group_size=32)
    code, result, _ = run("--model", str(tmp_path / "few"), *SMALL)
    assert (code, result["weights"], result["bits"]) == (0, "checkpoint", 4)
    assert result["beside_torch_int4"] == {"decode": None, "prefill": None}, "shapes that torch does not take"
    code, result, err = run("--model", str(tmp_path / "whole"), *SMALL)
    assert (code, result) == (2, {})
    assert "is not quantized; quantize it first: yuanmoe quantize" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--bits", "3"), 2, "3 bits; quantized weights have 4 or 8"),
        (("--preset", "m33"), 1, "unknown preset 'm33'; known presets: yuan2-m32"),
        (("--contexts", "16,x"), 2, "--contexts '16,x' is not a list of numbers from 1 on; write it like 16,512"),
        (("--batch", "0"), 2, "--batch '0' is not a list of numbers"),
        (
            ("--preset", "tiny", "--contexts", "300", "--prompts", "4"),
            1,
            "301 tokens do not fit the model's context of 256",
        ),
    ],
)
def test_wrong_calls_say_what_is_wrong(run, arguments, code, message):
    got, result, err = run(*arguments)
    assert (got, result) == (code, {})
    assert message in err


def test_memory_is_looked_at_before_it_is_taken(run, monkeypatch):
    monkeypatch.setattr(study, "read_machine", lambda: type("M", (), {"available_bytes": 8 << 30})())
    code, result, err = run("--preset", "yuan2-m32")
    assert (code, result) == (1, {})
    assert "yuan2-m32 with 24 layers in 4 bits needs 21" in err
    assert "20.0 GiB of weights, 768 MiB of keys and values; 8.00 GiB are free" in err
    layers = int(err.split("--layers ")[1].split(")")[0])
    few = preset("yuan2-m32", num_hidden_layers=layers)
    check_decode_settings("m32", few, policy(few, 4), DecodeSettings(), free=8 << 30)
    one_more = few.replace(num_hidden_layers=layers + 1)
    with pytest.raises(ResourceError, match=rf"fewer layers \(--layers {layers}\)"):
        check_decode_settings("m32", one_more, policy(few, 4), DecodeSettings(), free=8 << 30)


def test_memory_grows_with_sequences_and_shrinks_with_eight_bits():
    config = preset("yuan2-m32")
    precision = policy(config, 4)
    with pytest.raises(ResourceError, match=r"needs 25\..* 4\.5. GiB of keys and values"):
        check_decode_settings("m32", config, precision, DecodeSettings(contexts=(512,), batches=(1, 23)), free=23 << 30)
    check_decode_settings(
        "m32", config, precision, DecodeSettings(contexts=(512,), batches=(1, 8), kv_dtype=torch.int8), free=23 << 30
    )
    check_decode_settings("m32", config, precision, DecodeSettings(batches=(1, 8)), free=22 << 30)


def test_random_weights_spread_the_tokens_over_the_experts():
    torch.manual_seed(0)
    config = preset("tiny", hidden_size=256, num_hidden_layers=4)
    model = synthetic_model(config, policy(config, 4))
    ids = torch.randint(config.vocab_size, (1, 64))
    with torch.inference_mode():
        output = model(ids)
    assert output.logits.isfinite().all()
    for routing in output.routings:
        assert len(routing.experts.unique()) == config.experts_per_layer[0]


def test_torch_is_left_out_where_it_does_not_take_the_shapes():
    assert layer_beside_torch(preset("tiny", hidden_size=48), 1) is None
    found = layer_beside_torch(preset("tiny"), 3)
    assert found is not None
    assert {contender.unit for contender in found} == {"GOP/s"}
    for contender in found:
        contender.call()


def test_layers_stand_beside_those_of_transformers(run):
    pytest.importorskip("transformers")
    small = ("--preset", "tiny", "--layers", "1", "--prompt-tokens", "8", "--runs", "1", "--threads", "1")
    code, result, err = run(*small, "--dtype", "float32", command="layers")
    assert (code, result["dtype"], result["preset"]) == (0, "float32", "tiny")
    for phase in ("prefill", "decode"):
        assert result[phase]["yuanmoe"]["median_s"] > 0
        assert any(name.startswith("mixtral") for name in result[phase])
        assert phase in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--dtype", "int3"), "unknown dtype 'int3'"), (("--device", "foo"), "there is no device 'foo' for torch")],
)
def test_layers_that_cannot_be_made_are_wrong_calls(run, arguments, message):
    code, _, err = run(*arguments, command="layers")
    assert code == 2
    assert message in err
