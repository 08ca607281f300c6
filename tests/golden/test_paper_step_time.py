"""The tables of arXiv 2311.15786 that its own equations predict, from the inputs that it states."""

import pytest

from yuanmoe.plan import cost
from yuanmoe.plan.cluster.paper import Model, Step, Times, three_dimensional, without_tensor_parallel
from yuanmoe.presets import preset

YUAN_102B = Model(num_layers=84, hidden_size=8192, vocab_size=135_040, filtered=True)
YUAN_1 = Model(num_layers=76, hidden_size=16_384, vocab_size=53_228, filtered=False)

NETWORK = 2 * 195e9 / 8
"""Two cards of 195 Gb/s (appendix D)."""


def method_2(data: int, peer_to_peer: float) -> Times:
    """Table 6, method 2, with the inputs of appendix D; the rate of a chip, not stated there, is fitted to all six."""
    step = Step(
        flops=YUAN_102B.flops(1, 4096),
        parameters=YUAN_102B.parameters(),
        num_layers=84,
        hidden_size=8192,
        sequence_length=4096,
        micro_batch=1,
        accumulation=1152 // data,
        pipeline=32,
        data=data,
        flops_per_s=171.6e12,
        link=0.85 * peer_to_peer,
        network=NETWORK,
    )
    return without_tensor_parallel(step)


@pytest.mark.parametrize(
    ("data", "peer_to_peer", "seconds"),
    [
        (3, 100e9, 239.06),
        (3, 200e9, 238.40),
        (3, 400e9, 238.10),
        (8, 100e9, 101.22),
        (8, 200e9, 100.92),
        (8, 400e9, 100.81),
    ],
)
def test_table_6_method_2(data: int, peer_to_peer: float, seconds: float) -> None:
    assert method_2(data, peer_to_peer).total == pytest.approx(seconds, rel=0.001)


def test_table_5_term_by_term() -> None:
    # Yuan 1.0 with 245 billion parameters as published (arXiv 2110.04725): a batch of 3360 = 7 x 480 on 2128 devices.
    # Only the rate of a device and of a link are fitted, to T0 and T3.
    step = Step(
        flops=YUAN_1.flops(1, 2048),
        parameters=YUAN_1.parameters(),
        num_layers=76,
        hidden_size=16_384,
        sequence_length=2048,
        micro_batch=1,
        accumulation=480,
        pipeline=38,
        tensor=8,
        data=7,
        flops_per_s=176.325e12,
        link=520e9,
        network=NETWORK,
    )
    times = three_dimensional(step, filtered=False)
    assert times.compute == pytest.approx(36.666, abs=0.001)
    assert times.bubble == pytest.approx(2.826, abs=0.001)
    assert times.pipeline == pytest.approx(2.643, abs=0.001)
    assert times.exchange == pytest.approx(2.602, abs=0.001)
    assert times.gradients == pytest.approx(0.455, abs=0.001)
    assert times.total == pytest.approx(45.192, abs=0.002)
    yuan = three_dimensional(step, filtered=True)
    assert yuan.exchange / times.exchange == pytest.approx(64 / 48)


def test_the_parameters_of_yuan_1() -> None:
    assert YUAN_1.parameters() / 1e9 == pytest.approx(245.7, abs=0.05)


@pytest.mark.parametrize("name", ["2b", "51b", "102b"])
def test_the_parameters_of_yuan_2_but_for_the_last_norm(name: str) -> None:
    config = preset(name)
    model = Model(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        filtered=True,
    )
    assert model.parameters() == sum(cost.parameters(config).values()) - config.hidden_size


def test_the_flops_of_yuan_2_leave_out_lfa_and_head_and_mask_nothing() -> None:
    config = preset("102b")
    by_role = cost.active_parameters(config)
    counted = 8 * (by_role["attention"] + by_role["dense"]) + 4 * cost.attention_flops(config, 4096)
    assert YUAN_102B.flops(1, 4096) == pytest.approx(4096 * counted)
