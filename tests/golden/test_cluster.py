"""M32 and a 24-layer model of the paper on known clusters: what fits, what is chosen, and what is said otherwise."""

import dataclasses

import pytest

from yuanmoe.config import ModelConfig
from yuanmoe.errors import UsageError
from yuanmoe.plan import cost
from yuanmoe.plan.cluster.cluster import WIRES, Cluster, parse_cluster, wires_of
from yuanmoe.plan.cluster.layout import Layout, TrainingStep
from yuanmoe.plan.cluster.parts import Case
from yuanmoe.plan.cluster.relief import cluster_remedies
from yuanmoe.plan.cluster.search import Candidate, ClusterRequest, model_flops, model_flops_utilization, nearest, rank
from yuanmoe.plan.device.devices import DEVICES, find_device
from yuanmoe.presets import preset
from yuanmoe.units import GIB, parse_rate


def cluster_of(name: str, devices_per_node: int = 8, nodes: int = 12) -> Cluster:
    device = find_device(name)
    return Cluster(
        device=device, devices_per_node=devices_per_node, nodes=nodes, wires=wires_of(device), matmul_share=0.5
    )


def request(*words: str, name: str = "h100-80", nodes: int = 12, batch: int = 1536, **training: int) -> ClusterRequest:
    return ClusterRequest(
        training=TrainingStep(config=preset("m32"), sequence_length=4096, global_batch=batch, **training),
        cluster=cluster_of(name, nodes=nodes),
        words=words,
    )


def test_m32_on_96_gpus() -> None:
    best, *others = rank(request())
    assert best.layout.words == ("dp96", "pp1", "ep8", "fsdp", "mb4", "selective")
    assert best.peak_bytes < 80 * GIB
    assert [plan.time.total for plan in (best, *others)] == sorted(plan.time.total for plan in (best, *others))
    kinds = [(plan.layout.stages, plan.layout.experts) for plan in (best, *others)]
    assert len(set(kinds)) == len(kinds)
    # Model FLOPs over half of the peak, plus what is not computing; nothing is computed twice in this layout.
    share = best.time.compute / best.time.total / 2
    assert model_flops_utilization(request(), best.time.total) == pytest.approx(share, rel=0.001)


def test_model_flops_are_counted_as_everywhere() -> None:
    per_token = 3 * (7_408_111_616 + 4 * 4096 * 24 * 4097 / 2)
    assert model_flops(request().training) == pytest.approx(1536 * 4096 * per_token)


def test_weights_gradients_and_optimizer_of_the_published_layout() -> None:
    # 24 layers over 8 stages, 12 data ranks, nothing sharded: 18 bytes of each parameter on the device.
    asked = dataclasses.replace(request("pp8", "ep1", "replicated", "mb2", "full"), stages=(3,) * 8)
    plan = nearest(asked)
    layer = 1_652_761_600
    inner = plan.memory[3]
    assert (inner.weights, inner.gradients, inner.optimizer) == (6 * layer, 12 * layer, 36 * layer)
    assert plan.memory[0].optimizer == 12 * (3 * layer + 276_561_920)
    # Tied, but the last stage is another device, so it has a copy; and the last norm.
    assert plan.memory[7].optimizer == 12 * (3 * layer + 276_561_920 + 2048)
    # The first stage holds the inputs of 3 layers for 8 micro-batches in flight, the last for one.
    kept = 3 * 2 * 4096 * 2 * 2048
    assert plan.memory[0].activations - plan.memory[7].activations == 7 * kept
    # More than 80 GiB: the published script ran on larger devices, or sharded after all.
    assert plan.peak_bytes / GIB == pytest.approx(94.2, abs=0.1)
    sharded = nearest(dataclasses.replace(asked, words=("pp8", "ep1", "optimizer", "mb2", "full")))
    assert sharded.memory[3].optimizer == 36 * layer / 12
    spread = nearest(dataclasses.replace(asked, words=("pp8", "ep4", "replicated", "mb2", "full")))
    assert spread.memory[3].weights == 6 * (layer - 3 * 1_610_612_736 // 4)


def test_tokens_travel_to_experts_and_back() -> None:
    def experts_s(*words: str) -> float:
        return rank(request("pp1", "fsdp", "mb1", *words))[0].time.experts

    assert experts_s("ep1", "full") == 0
    # 16 micro-batches, 24 layers, 4 journeys of K x D bfloat16 a token, 7 of 8 to neighbours over NVLink.
    sent = 16 * 24 * 4 * 4096 * 2 * 2048 * 2 * 7 / 8
    assert experts_s("ep8", "selective") == pytest.approx(sent / (0.85 * 450e9))
    assert experts_s("ep8", "full") == pytest.approx(1.5 * sent / (0.85 * 450e9))
    # Over 16, half of them on another node, over one card a GPU; NVLink carries the rest meanwhile.
    assert experts_s("ep16", "selective") == pytest.approx(sent / 7 * 8 / 2 / (0.975 * 50e9))


def test_m32_needs_a_little_more_than_eight_gpus() -> None:
    asked = request(nodes=1, batch=1024)
    assert rank(asked) == []
    plan = nearest(asked)
    assert plan.layout.words == ("dp8", "pp1", "ep8", "fsdp", "mb1", "full")
    assert plan.peak_bytes / GIB == pytest.approx(82.6, abs=0.1)
    assert cluster_remedies(asked, plan) == ["--nodes 2", "devices with 83 GiB", "--cluster 8xh200"]
    assert rank(request("ep8", "fsdp", "full", nodes=2, batch=1024))
    assert rank(request("ep8", "fsdp", "full", name="h200", nodes=1, batch=1024))


def test_what_was_asked_for_may_be_what_does_not_fit() -> None:
    asked = dataclasses.replace(request("replicated", "ep1"), stages=(12, 12))
    found = cluster_remedies(asked, nearest(asked))
    assert found[0] == "without --stages"
    assert found[1].startswith("devices with "), "neither more devices nor shorter sequences make a stage smaller"


def test_shorter_sequences_help_where_intermediate_results_are_the_problem() -> None:
    training = TrainingStep(config=preset("2b", max_position_embeddings=2**17), sequence_length=2**17, global_batch=8)
    asked = ClusterRequest(training=training, cluster=cluster_of("rtx-4090", nodes=1))
    assert "--seq 65536" in cluster_remedies(asked, nearest(asked))


PAPER = ModelConfig(
    vocab_size=135_040,
    hidden_size=6144,
    num_hidden_layers=24,
    num_attention_heads=48,
    head_dim=128,
    intermediate_size=4 * 6144,
)
"""The paper's example of non-uniform stages: 24 layers of hidden size 6144."""


@pytest.mark.parametrize(("micro_batch", "equal", "chosen"), [(1, 63.7, 50.7), (2, 99.4, 74.7)])
def test_the_papers_example_of_unequal_stages(micro_batch: int, equal: float, chosen: float) -> None:
    """Printed: 78 GB in equal stages, 56 GB in [2, 2, 3, 3, 4, 4, 4, 2]; batch, sequence and sharding are not."""
    layout = Layout(data=4, stages=8, experts=1, sharding="optimizer", micro_batch=micro_batch, checkpointing="none")
    cluster = cluster_of("a100-80", nodes=4)
    training = TrainingStep(config=PAPER, sequence_length=4096, global_batch=1152)
    candidate = Candidate(Case(training=training, cluster=cluster, layout=layout))
    best = candidate.plan()
    assert best.stages == (2, 2, 3, 3, 4, 4, 4, 2)
    assert best.peak_bytes / 1e9 == pytest.approx(chosen, abs=0.1)
    assert candidate.plan((3,) * 8).peak_bytes / 1e9 == pytest.approx(equal, abs=0.1)


def test_the_published_stages_of_102b_are_equally_full() -> None:
    """2 x 10, 3 x 20, 2, 2 layers with full checkpointing and a sharded optimizer (official script), 96 devices."""
    training = TrainingStep(config=preset("102b"), sequence_length=4096, global_batch=1152)
    cluster = cluster_of("a100-80")
    layout = Layout(data=3, stages=32, experts=1, sharding="optimizer", micro_batch=1, checkpointing="full")
    candidate = Candidate(Case(training=training, cluster=cluster, layout=layout))
    memory = candidate.plan((*[2] * 10, *[3] * 20, 2, 2)).memory
    # The embedding is worth a layer of the first stage, head and loss one of the last.
    ends = [memory[stage].total / memory[10].total for stage in (0, 31)]
    assert ends == pytest.approx([1, 1], abs=0.03)


def test_a_published_run_of_another_model() -> None:
    """Megatron-Core's Mixtral 8x7B on 64 H100: 468 TFLOP/s a GPU, 47 % of peak, in this layout with 8 stages each."""
    config = ModelConfig(
        vocab_size=32_000,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,  # with keys and values of their own, which Mixtral's share: 2 % more FLOPs
        head_dim=128,
        num_experts=8,
        moe_intermediate_size=14_336,
        router="linear",
        localized_filtering=False,
        tie_word_embeddings=False,
        eod_token_id=0,
        sep_token_id=0,
        pad_token_id=0,
    )
    asked = ClusterRequest(
        training=TrainingStep(config=config, sequence_length=4096, global_batch=256),
        cluster=cluster_of("h100-80", nodes=8),
        words=("ep8", "mb1", "optimizer", "none"),
        stages=(8, 8, 8, 8),
    )
    (plan,) = rank(asked)
    assert plan.peak_bytes < 80 * GIB
    assert model_flops_utilization(asked, plan.time.total) == pytest.approx(0.385, abs=0.001)
    interleaved = plan.time.total - plan.time.bubble * 7 / 8  # which this model of a step has not
    assert model_flops_utilization(asked, interleaved) == pytest.approx(0.451, abs=0.001)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": (2, 2)}, "stages 2,2 have 4 layers together; the model has 24"),
        ({"stages": (24, 0)}, "stages 24,0: each needs at least one layer"),
        (
            {"stages": (4, 4, 4, 4, 8)},
            "96 devices are not a multiple of 5 stages; there can be 1, 2, 3, 4, 6, 8, 12, 16, 24 stages",
        ),
        ({"words": ("pp5",)}, "no layout of 96 devices has 'pp5'; there are pp1, pp2, pp3, pp4, pp6, pp8, pp12, "),
        ({"words": ("zero3",)}, "no layout of 96 devices has 'zero3'; there are dp96, pp1, ep1, replicated, mb1, "),
        ({"words": ("pp8", "dp96")}, "no layout of 96 devices is pp8 dp96 at once; leave out a word"),
    ],
)
def test_layouts_that_cannot_be(changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rank(dataclasses.replace(request(), **changes))


def test_a_batch_that_cannot_be_shared() -> None:
    with pytest.raises(
        UsageError,
        match="a global batch of 7 cannot be shared equally by 96 devices: with up to 24 pipeline stages there are at "
        "least 4 data ranks; take a multiple of 4",
    ):
        rank(request(batch=7))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8xh10-80", r"unknown cluster '8xh10-80'; write it like 8xh100-80 or cpu; did you mean h100-80\?"),
        ("abacus", "write it like 8xh100-80 or cpu; known: a100-80, "),
        ("mac-m4-max-64", "unknown cluster 'mac-m4-max-64'"),
    ],
)
def test_unknown_hardware(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_cluster(text)


def test_known_hardware() -> None:
    assert parse_cluster(" 8xH100-80") == (8, "h100-80")
    assert parse_cluster("24gib-2core") == (1, "24gib-2core")
    assert parse_cluster("cpu") == (1, "cpu")
    for name, wires in WIRES.items():
        assert DEVICES[name].bf16_flops
        assert wires.link > wires.card
        assert wires.link_source
        assert wires.card_source
    assert (WIRES["h100-80"].link, WIRES["h100-80"].card) == (450e9, 50e9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": 0}, "nodes is 0; it must be at least 1"),
        ({"devices_per_node": 0}, "devices per node is 0; it must be at least 1"),
        ({"matmul_share": 0.0}, "efficiency 0.0 is not a share above 0 and up to 1"),
        ({"matmul_share": float("nan")}, "efficiency nan is not a share"),
    ],
)
def test_clusters_that_cannot_be(changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(cluster_of("h200"), **changes)


@pytest.mark.parametrize(("field", "name"), [("sequence_length", "sequence length"), ("global_batch", "global batch")])
def test_training_of_nothing(field: str, name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is 0; it must be at least 1"):
        dataclasses.replace(request().training, **{field: 0})


@pytest.mark.parametrize(
    ("text", "rate"), [("450GB/s", 450e9), ("400Gb/s", 50e9), ("1.25 GB/s", 1.25e9), ("10Mb/s", 1.25e6)]
)
def test_rates(text: str, rate: float) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["450", "450GB", "0GB/s", "fast", "450 gb"])
def test_rates_need_a_number_and_a_unit(text: str) -> None:
    with pytest.raises(UsageError, match="is not a number with a unit; write it like 450GB/s, or 400Gb/s in bits"):
        parse_rate(text)


def test_wires_by_place() -> None:
    cluster = cluster_of("h100-80", nodes=2)
    link, card = 0.85 * 450e9, 0.975 * 50e9
    assert cluster.ring(8) == cluster.ring(4) == cluster.ring(2, stride=4) == link
    assert cluster.ring(16) == min(link, 8 * card)
    assert cluster.ring(2, stride=8) == card, "each GPU of a node rings with its twin on the other node"
    assert cluster.ring(12) == 4 * card, "some of the rings have only four of their ranks in a node"
    assert cluster.boundary(data=2, stages=4) == link
    assert cluster.boundary(data=8, stages=2) == card
    shared = cluster_of("rtx-4090", devices_per_node=4, nodes=2)
    assert shared.network(4) == 0.975 * 12.5e9 / 4
    assert shared.boundary(data=4, stages=2) == shared.network(4)
    assert shared.boundary(data=1, stages=8) == shared.network(1)


def test_the_count_of_flops_is_that_of_cost() -> None:
    # One stage, no sharding, nothing computed twice: the time of a step is the model's FLOPs over the rate.
    config = preset("2b")
    training = TrainingStep(config=config, sequence_length=4096, global_batch=8)
    asked = ClusterRequest(training=training, cluster=cluster_of("h200", 1, 1), words=("none", "mb1"))
    (plan,) = rank(asked)
    flops = 8 * 4096 * cost.training_flops(config, 4097 / 2)
    assert plan.time.compute == pytest.approx(flops / (0.5 * 989e12))
    assert plan.time.bubble == plan.time.pipeline == plan.time.experts == plan.time.gradients == 0
