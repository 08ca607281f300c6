"""Quantized checkpoints of every format: what is in them, what they lost, and that the model over them computes it."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_writers import official_json, official_state, write_bin, write_gptq, write_megatron, write_safetensors
from small_models import random_ids, random_model, small_config
from yuanmoe.checkpoint.formats.gptq import GPTQTensor
from yuanmoe.checkpoint.formats.packed_weight import PackedWeight
from yuanmoe.checkpoint.load import load_model, load_state
from yuanmoe.checkpoint.open import open_checkpoint
from yuanmoe.checkpoint.quantize.encoding import Noise
from yuanmoe.checkpoint.quantize.quantize import quantize_checkpoint
from yuanmoe.checkpoint.quantize.report import decibels
from yuanmoe.checkpoint.write.save import save_native
from yuanmoe.engine.generate import Generation
from yuanmoe.engine.sampling import SamplingParams
from yuanmoe.errors import CheckpointError, UsageError
from yuanmoe.evals.quality import read_loaded, read_streamed
from yuanmoe.ops import native
from yuanmoe.ops.quantize.groupwise import dequantize_weight, unpack_weight
from yuanmoe.ops.quantize.groupwise import quantize_weight as quantize_tensor

# The released layout has no key for it: hidden / heads channels of a head rotate.
CONFIG = small_config(hidden_size=64, head_dim=64, intermediate_size=0, moe_intermediate_size=32, initializer_range=0.1)
DENSE = CONFIG.replace(num_experts=0, moe_intermediate_size=0, intermediate_size=96, head_dim=32).replace(
    partial_rotary_factor=1.0
)


def weights(config, dtype=torch.bfloat16):
    return {name: tensor.to(dtype) for name, tensor in random_model(config).state_dict().items()}


def write(kind, folder, config):
    """A checkpoint of any format with the weights of `random_model`."""
    state = weights(config)
    if kind == "native":
        save_native(state, config, folder)
    elif kind == "megatron":
        write_megatron(folder, config, state, stages=2)
        (folder / "config.json").write_text(json.dumps(official_json(config)))
    else:
        save = write_bin if kind == "bin" else write_safetensors
        save(folder, official_json(config), official_state(config, state), shards=2)
    return folder


def distance(found, expected):
    """Of the logits of most tokens, in units of their size; a few may have gone to other experts."""
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median().item()


@pytest.mark.parametrize("kind", ["safetensors", "bin", "megatron", "native"])
@pytest.mark.parametrize("config", [CONFIG, DENSE], ids=["moe", "dense"])
@torch.inference_mode()
def test_every_format_is_quantized_and_speaks(tmp_path, kind, config):
    src = write(kind, tmp_path / "src", config)
    quantize_checkpoint(src, tmp_path / "dst", bits=8, method="rtn")
    source, found = open_checkpoint(src), open_checkpoint(tmp_path / "dst")
    assert (found.config, found.dtype) == (source.config, torch.bfloat16)
    for name, tensor in found.tensors.items():
        whole = source.tensors[name].read()
        if isinstance(tensor, PackedWeight):
            steps = unpack_weight(tensor.packed()).scales.float().repeat_interleave(64, -1)[..., : whole.shape[-1]]
            error = (dequantize_weight(tensor.packed()).view(whole.shape) - whole.float()).abs()
            # The largest weight of a group may fall on code 128, which there is not: one step less.
            assert (error <= steps.abs().view(whole.shape) * 1.001).all(), name
            assert error.mean() <= steps.abs().mean() / 3, name
        else:
            assert torch.equal(tensor.read(), whole), name
    model, whole = load_model(tmp_path / "dst"), load_model(src, dtype=torch.float32)
    ids = random_ids(40)
    cache = model.new_cache(1, 40)
    logits = model.logits(model.model(ids, cache.extend([40]))[0])
    assert distance(logits, whole(ids[None]).logits[0]) < 0.05
    tokens = list(Generation(model, [ids.tolist()], SamplingParams(max_new_tokens=5)))
    assert len(tokens) == 5


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_of_gptq_files_are_kept_bit_for_bit(tmp_path, bits):
    official = official_state(CONFIG, weights(CONFIG))
    write_gptq(tmp_path / "src", official_json(CONFIG), official, bits, (0.3, 0.7), group=32, symmetric=True)
    roles = {"lfa": 16, "embedding": 16}
    done = quantize_checkpoint(tmp_path / "src", tmp_path / "dst", roles=roles)
    assert done.report["roles"]["experts"]["bits"] == bits
    source, found = open_checkpoint(tmp_path / "src"), open_checkpoint(tmp_path / "dst")
    assert done.report["group_size"] == 32
    for name, tensor in found.tensors.items():
        # fp16, to which the files' weights are rounded once; the kernels see code times scale itself.
        assert torch.equal(tensor.read(), source.tensors[name].read()), name
    stored = source.stored["model.layers.1.self_attn.v_proj.weight"]
    kept = found.tensors["model.layers.1.self_attn.v_proj.weight"]
    assert isinstance(stored, GPTQTensor)
    assert isinstance(kept, PackedWeight)
    codes, scales = stored.signed(0, stored.shape[0])
    assert torch.equal(unpack_weight(kept.packed()).codes, codes)
    assert torch.equal(unpack_weight(kept.packed()).scales, scales)
    assert done.report["roles"]["experts"]["snr_db"] is None
    assert "12 of 12 quantized weights keep the codes of the GPTQ files bit for bit" in done.report["notes"][0]
    assert done.report["worst"] == []


def test_gptq_codes_that_no_kernel_knows_are_quantized_again_and_it_is_said(tmp_path):
    official = official_state(CONFIG, weights(CONFIG))
    write_gptq(tmp_path / "src", official_json(CONFIG), official, 4, (), group=32)
    done = quantize_checkpoint(tmp_path / "src", tmp_path / "dst", bits=8)
    assert done.report["group_size"] == 64
    assert "0 of 17 quantized weights keep the codes" in done.report["notes"][-1]
    assert done.report["roles"]["experts"]["snr_db"] > 40


def test_the_policy_is_by_role_and_can_be_overridden(tmp_path):
    untied = CONFIG.replace(tie_word_embeddings=False)
    save_native(weights(untied), untied, tmp_path / "src")
    quantize_checkpoint(tmp_path / "src", tmp_path / "four", bits=4)
    record = json.loads((tmp_path / "four" / "config.json").read_text())["quantization"]
    assert record == {
        "layout": 1,
        "method": "mse",
        "group_size": 64,
        "roles": {"embedding": 8, "lfa": 8, "attention": 4, "experts": 4, "head": 8},
    }
    quantize_checkpoint(
        tmp_path / "src", tmp_path / "own", bits=8, group_size=32, roles={"experts": 4, "head": 16, "lfa": 4}
    )
    record = json.loads((tmp_path / "own" / "config.json").read_text())["quantization"]
    assert record["roles"] == {"embedding": 8, "lfa": 4, "attention": 8, "experts": 4}
    state = load_state(open_checkpoint(tmp_path / "own"))
    kinds = {name.rpartition(".")[2]: tensor.dtype for name, tensor in state.items() if "q_proj" in name}
    assert kinds == {"codes": torch.uint8, "scales": torch.float16}
    assert state["lm_head.weight"].dtype == state["model.layers.0.mlp.router.weight"].dtype == torch.bfloat16
    assert load_model(tmp_path / "own").model.layers[1].mlp.experts.gate_up_proj.format.bits == 4


WRONG = {
    "no such bits": ({"bits": 3}, r"^3 bits; quantized weights have 4 or 8$"),
    "no such group": ({"group_size": 48}, r"^group size 48; it must be 32, 64 or 128$"),
    "router": ({"roles": {"router": 8}}, r"^router stays as it is: routers decide by small differences"),
    "no such role": ({"roles": {"expert": 4}}, r"^'expert' is no role of this model's matrices; roles: attention, emb"),
    "tied": ({"roles": {"head": 8}}, r"^'head' is no role of this model's matrices; its head is the embedding; roles"),
    "bits of a role": ({"roles": {"lfa": 6}}, r"^lfa=6: it can have 4 or 8 bits, or 16 to stay as it is$"),
    "nothing": ({"roles": dict.fromkeys(("experts", "attention", "lfa", "embedding"), 16)}, r"^every role stays as it"),
    "method": ({"method": "awq"}, r"^method 'awq'; known: rtn, mse, gptq$"),
    "no text": ({"method": "gptq"}, r"^gptq rounds by a text: give it one, --calibration FILE, or take --method mse"),
    "useless text": ({"method": "rtn", "calibration": [1, 2]}, r"^rtn uses no calibration text; leave it out, or take"),
    "strange text": ({"method": "gptq", "calibration": [1, 99]}, r"calibration text holds the token id 99; ids are 0"),
}


@pytest.mark.parametrize(("settings", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_does_not_go_together_is_refused_before_anything_is_written(tmp_path, settings, message):
    save_native(weights(CONFIG), CONFIG, tmp_path / "src")
    with pytest.raises(UsageError, match=message):
        quantize_checkpoint(tmp_path / "src", tmp_path / "dst", **{"bits": 4} | settings)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_the_report_is_what_was_lost(tmp_path):
    state = weights(CONFIG)
    save_native(state, CONFIG, tmp_path / "src")
    report = quantize_checkpoint(tmp_path / "src", tmp_path / "dst", bits=4).report
    assert report == json.loads((tmp_path / "dst" / "quantization.json").read_text())
    found = open_checkpoint(tmp_path / "dst")
    sizes = {name: tensor.nbytes for name, tensor in found.stored.items()}
    assert report["total"] == {
        "parameters": sum(tensor.numel() for tensor in state.values()),
        "source_bytes": sum(tensor.nbytes for tensor in state.values()),
        "bytes": sum(sizes.values()),
    }
    assert report["roles"]["experts"]["bytes"] == sum(size for name, size in sizes.items() if ".experts." in name)

    def noise_of(name):
        lossy, whole = (
            dequantize_weight(found.tensors[name].packed()).double().view(state[name].shape),
            state[name].double(),
        )
        return Noise(whole.square().sum().item(), (lossy - whole).square().sum().item())

    names = (f"model.layers.1.mlp.experts.{part}" for part in ("gate_up_proj", "down_proj"))
    layer = sum(map(noise_of, names), Noise(0.0, 0.0))
    assert report["layers"][1]["experts"] == pytest.approx(decibels(layer), abs=0.02)
    embedding = decibels(noise_of("model.embed_tokens.weight"))
    assert report["roles"]["embedding"]["snr_db"] == pytest.approx(embedding, abs=0.02)
    worst = report["worst"]
    assert [each["snr_db"] for each in worst] == sorted(each["snr_db"] for each in worst)
    assert len(worst) == 10
    assert worst[0]["snr_db"] <= report["roles"]["experts"]["snr_db"]


def test_padding_is_said(tmp_path):
    odd = small_config(hidden_size=34, head_dim=20, moe_intermediate_size=22, initializer_range=0.1)
    save_native(weights(odd), odd, tmp_path / "src")
    done = quantize_checkpoint(tmp_path / "src", tmp_path / "dst", bits=4, group_size=128)
    assert "more than their bits: rows are padded to 16 and inputs to whole groups" in done.report["notes"][0]
    ids = random_ids(9)
    whole, found = (load_model(tmp_path / name, dtype=torch.float32) for name in ("src", "dst"))
    with torch.inference_mode():
        logits = found.logits(found.model(ids, found.new_cache(1, 9).extend([9]))[0])
        assert distance(logits, whole(ids[None]).logits[0]) < 0.5


def test_mse_loses_less_than_rounding_and_gptq_changes_the_model_least(tmp_path):
    config = CONFIG.replace(num_experts=4)
    save_native(weights(config), config, tmp_path / "src")
    ids = random_ids(1200).tolist()
    reports, errors = {}, {}
    source = open_checkpoint(tmp_path / "src")
    pieces = [ids[start : start + 100] for start in range(0, 1200, 100)]
    original = read_streamed(source, pieces)
    for method in ("rtn", "mse", "gptq"):
        text = ids if method == "gptq" else []
        roles = {"embedding": 16, "lfa": 4}
        done = quantize_checkpoint(
            tmp_path / "src", tmp_path / method, bits=4, roles=roles, method=method, calibration=text
        )
        reports[method] = done.report
        reading = read_loaded(load_model(tmp_path / method), pieces)
        errors[method] = (reading.nats - original.nats).abs().mean().item()
    assert reports["mse"]["roles"]["experts"]["snr_db"] > reports["rtn"]["roles"]["experts"]["snr_db"]
    # Its errors are chosen by what they do, not by their size.
    assert reports["gptq"]["roles"]["experts"]["snr_db"] < reports["mse"]["roles"]["experts"]["snr_db"]
    assert errors["gptq"] < 0.9 * errors["mse"]


def test_experts_that_the_text_hardly_reached_are_named(tmp_path):
    save_native(weights(CONFIG), CONFIG, tmp_path / "src")
    done = quantize_checkpoint(tmp_path / "src", tmp_path / "dst", bits=4, method="gptq", calibration=[3, 4, 5])
    assert any("matrices met few tokens of the calibration text" in note for note in done.report["notes"])
    assert any("of expert" in note for note in done.report["notes"])


@torch.inference_mode()
def test_without_the_compiled_kernels_the_numbers_are_the_same(tmp_path, monkeypatch):
    save_native(weights(CONFIG), CONFIG, tmp_path / "src")
    quantize_checkpoint(tmp_path / "src", tmp_path / "dst", bits=4)
    ids = random_ids(30).tolist()
    compiled = read_loaded(load_model(tmp_path / "dst"), [ids])
    monkeypatch.setattr(native, "chosen", lambda: None)
    monkeypatch.setattr(native, "available", lambda: False)
    plain = read_loaded(load_model(tmp_path / "dst"), [ids])
    torch.testing.assert_close(plain.nats, compiled.nats, atol=1e-3, rtol=1e-3)
    assert torch.equal(plain.likeliest, compiled.likeliest)


def test_decibels():
    assert decibels(Noise(100.0, 1.0)) == 20.0
    assert decibels(Noise(1.0, 0.0)) is None
    assert math.isclose(decibels(Noise(2.0, 1.0)), 3.01)


@pytest.mark.parametrize("bits", [4, 8])
def test_scales_of_least_error_do_not_shrink_the_weights(bits):
    """What `mse` makes of weights is as long as they are along them, and closer to them than rounding is."""
    weight = torch.randn(256, 512)
    lossy = {method: dequantize_weight(quantize_tensor(weight, bits, 64, method)) for method in ("rtn", "mse")}
    along = (lossy["mse"] * weight).sum() / weight.square().sum()
    assert abs(along.item() - 1) < 1e-4
    errors = {method: (found - weight).square().sum().item() for method, found in lossy.items()}
    assert errors["mse"] < 0.96 * errors["rtn"]
    empty = torch.zeros(16, 64)
    empty[3, 5] = 1e-25
    assert dequantize_weight(quantize_tensor(empty, bits, 64, "mse")).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["model.layers.1.input_layernorm.weight", "model.layers.0.mlp.router.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_tensor_that_stays_whole_must_hold_numbers(tmp_path, name, value):
    state = weights(CONFIG)
    state[name].view(-1)[1] = value
    save_native(state, CONFIG, tmp_path / "src")
    with pytest.raises(CheckpointError, match=f"{name} holds 1 values that are infinite or no numbers"):
        quantize_checkpoint(tmp_path / "src", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("header", ["gptq", "gptq_v2"])
def test_zeros_of_version_2_are_read_as_they_are_whatever_the_header_says(tmp_path, bits, header):
    official = official_state(CONFIG, weights(CONFIG))
    torch.manual_seed(3)
    write_gptq(tmp_path / "one", official_json(CONFIG), official, bits, (), group=32, symmetric=True)
    expected = open_checkpoint(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (file,) = (tmp_path / "two").glob("*.safetensors00")
    stored = load_file(file)
    middle = int.from_bytes(bytes([0x88 if bits == 4 else 0x80] * 4), "little") - 2**32
    stored = {n: torch.full_like(t, middle) if n.endswith("qzeros") else t for n, t in stored.items()}
    save_file(stored, file)
    for name in ("config.json", "quantize_config.json"):
        values = json.loads((tmp_path / "two" / name).read_text())
        values.get("quantization_config", values)["checkpoint_format"] = header
        (tmp_path / "two" / name).write_text(json.dumps(values))
    found = open_checkpoint(tmp_path / "two")
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name].read(), tensor.read()), name
    done = quantize_checkpoint(tmp_path / "two", tmp_path / "dst", roles={"lfa": 16, "embedding": 16})
    assert done.report["group_size"] == 32
