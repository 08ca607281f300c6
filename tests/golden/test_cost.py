"""The published numbers of the released models, exactly."""

import pytest
import torch

from yuanmoe.errors import UsageError
from yuanmoe.model.decoder import CausalLM
from yuanmoe.ops.quantize.groupwise import pack_weight, quantize_weight
from yuanmoe.plan import cost
from yuanmoe.plan.activations import activation_bytes
from yuanmoe.presets import PRESETS, preset

M32 = preset("m32")


@pytest.mark.parametrize(
    ("name", "tied", "untied"),
    [
        ("m32", 39_942_842_368, 40_219_404_288),
        ("2b", 2_088_724_480, 2_365_286_400),
        ("51b", 51_842_105_344, 52_948_353_024),
        ("102b", 102_577_954_816, 103_684_202_496),
    ],
)
def test_parameters_of_the_released_models(name: str, tied: int, untied: int) -> None:
    config = preset(name)
    assert sum(cost.parameters(config).values()) == tied
    assert sum(cost.parameters(config.replace(tie_word_embeddings=False)).values()) == untied


def test_parameters_of_a_layer_of_m32() -> None:
    by_role = cost.parameters(M32)
    assert by_role == {
        "embedding": 276_561_920,
        "head": 0,
        "attention": 24 * 33_554_432,
        "lfa": 24 * 8_391_680,
        "router": 24 * 196_608,
        "norms": 24 * 6_144 + 2_048,
        "experts": 24 * 1_610_612_736,
        "shared_experts": 0,
        "dense": 0,
    }
    one_layer = M32.replace(num_hidden_layers=1)
    assert sum(cost.parameters(M32.replace(num_hidden_layers=2)).values()) - sum(
        cost.parameters(one_layer).values()
    ) == (1_652_761_600)


def test_a_dense_layer_of_2b() -> None:
    config = preset("2b")
    assert cost.parameters(config)["dense"] == 24 * 3 * 2048 * 8192
    assert sum(cost.parameters(config).values()) == 24 * 75_506_688 + 276_561_920 + 2_048


def test_active_parameters_count_the_head_once_and_no_embedding() -> None:
    assert sum(cost.active_parameters(M32).values()) == 3_704_055_808
    assert cost.active_parameters(M32.replace(tie_word_embeddings=False)) == cost.active_parameters(M32)
    assert cost.active_parameters(M32)["embedding"] == 0


def test_flops_of_the_article() -> None:
    assert cost.forward_flops(M32) == 7_408_111_616
    assert cost.training_flops(M32) / 1e9 == pytest.approx(22.2, abs=0.05)
    assert cost.attention_flops(M32, 4096) == 2 * 2 * 16 * 256 * 4096 * 24 == 1_610_612_736
    assert cost.attention_flops(M32, 16_384) / 1e9 == pytest.approx(6.44, abs=0.005)


def test_fine_tuning_beside_llama() -> None:
    assert round(cost.fine_tuning_petaflops_days(cost.training_flops(M32)), 4) == 0.0026
    assert round(cost.fine_tuning_petaflops_days(cost.LLAMA3_70B.training_flops), 2) == 0.05


def test_state_of_m32() -> None:
    assert cost.kv_bytes(M32) == 393_216
    assert cost.lfa_bytes(M32) == 147_456
    assert cost.lfa_bytes(M32.replace(localized_filtering=False)) == 0


def test_bytes_of_m32() -> None:
    # 16 bits: two bytes a parameter. 8 bits: one byte and 1/32 of a 16-bit scale, except router, norms and biases.
    whole = 24 * (196_608 + 6_144 + 3 * 1_024) + 2_048
    matrices = 39_942_842_368 - whole
    small = 276_561_920 + 24 * 2 * 1024 * 2048 * 2
    assert sum(cost.weight_bytes(M32, cost.PRECISIONS[16]).values()) == 2 * 39_942_842_368
    assert sum(cost.weight_bytes(M32, cost.PRECISIONS[8]).values()) == matrices + matrices // 32 + 2 * whole
    assert sum(cost.weight_bytes(M32, cost.PRECISIONS[4]).values()) == (
        (matrices - small) // 2 + small + matrices // 32 + 2 * whole
    )


def test_one_token_reads_the_active_parameters() -> None:
    assert cost.read_bytes(M32, cost.PRECISIONS[16]) == 2 * 3_704_055_808
    empty = cost.decode_bytes(M32, cost.PRECISIONS[16], context=0)
    full = cost.decode_bytes(M32, cost.PRECISIONS[16], context=4096)
    assert empty == 2 * 3_704_055_808 + 147_456
    assert full - empty == 4096 * 393_216


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(16, 64), (3, 65), (33, 7), (40, 200)])
def test_quantized_bytes_are_those_of_the_packed_layout(shape: tuple[int, int], bits: int) -> None:
    weight = cost.Weight(role="experts", shape=shape)
    packed = pack_weight(quantize_weight(torch.ones(shape), bits, 64))
    assert cost.PRECISIONS[bits].weight_bytes(weight) == packed.nbytes


def test_expected_experts_of_m32() -> None:
    assert cost.expected_experts(32, 2, 1) == 2
    assert cost.expected_experts(32, 2, 16) == pytest.approx(32 * (1 - 0.9375**16))


def test_activations_of_m32() -> None:
    # Widest at the experts: residual and normed input, and for each of 2 experts input, output, gate, up, product.
    widest = 2 * 2048 + 2 * (2 * 2048 + 3 * 8192)
    assert activation_bytes(M32, 10, 3) == 10 * widest * 2 + 3 * 135_040 * 4


def test_unknown_bits_say_which_there_are() -> None:
    with pytest.raises(UsageError, match="5 bits: weights are kept in 16, 8, 4 bits"):
        cost.precision(5)


@pytest.mark.parametrize("name", PRESETS)
def test_the_module_has_as_many_parameters(name: str) -> None:
    config = preset(name)
    with torch.device("meta"):
        model = CausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(cost.parameters(config).values())
