"""Laws of the model of a training step: the paper's where that applies, and nothing gets worse with more devices."""

import dataclasses

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from yuanmoe.plan import cost
from yuanmoe.plan.activations import CHECKPOINTING, Checkpointing
from yuanmoe.plan.cluster.cluster import WIRES, Cluster, wires_of
from yuanmoe.plan.cluster.layout import SHARDING, Layout, TrainingStep, layouts
from yuanmoe.plan.cluster.parts import Case
from yuanmoe.plan.cluster.search import Candidate, ClusterRequest, Plan, equation_4_s, nearest, rank
from yuanmoe.plan.device.devices import DEVICES
from yuanmoe.presets import preset

MODELS = {name: preset(name) for name in ("m32", "2b", "nano")} | {
    "uneven": preset("nano", num_hidden_layers=6, num_experts=[8, 0, 16, 0, 4, 8], intermediate_size=512)
}

clusters = st.builds(
    Cluster,
    device=st.sampled_from([DEVICES[name] for name in (*WIRES, "24gib-2core")]),
    devices_per_node=st.sampled_from([1, 2, 4, 8]),
    nodes=st.integers(1, 6),
    wires=st.sampled_from([wires_of(DEVICES[name]) for name in ("h100-80", "rtx-4090", "24gib-2core")]),
    matmul_share=st.floats(0.1, 1),
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    config = MODELS[draw(st.sampled_from(sorted(MODELS)))]
    cluster = draw(clusters)
    batch = cluster.size * 2 ** draw(st.integers(0, 4))
    training = TrainingStep(config=config, sequence_length=draw(st.integers(1, 9000)), global_batch=batch)
    layout = draw(st.sampled_from(list(layouts(training, cluster.size))))
    return Case(training=training, cluster=cluster, layout=layout)


def planned(case: Case, **changes: object) -> Plan:
    layout = dataclasses.replace(case.layout, **changes)  # type: ignore[arg-type]
    return Candidate(dataclasses.replace(case, layout=layout)).plan()


@settings(deadline=None, max_examples=80)
@given(cases())
def test_the_parts_are_the_whole(case: Case) -> None:
    plan = planned(case)
    assert sum(plan.stages) == case.training.config.num_hidden_layers
    assert len(plan.stages) == len(plan.memory) == case.layout.stages
    assert all(getattr(plan.time, part) >= 0 for part in dataclasses.asdict(plan.time))
    assert plan.time.total == pytest.approx(sum(dataclasses.asdict(plan.time).values()))
    for memory in plan.memory:
        assert memory.total == sum(dataclasses.asdict(memory).values())
    bound = Candidate(case)
    assert plan.time.total >= bound.least_s() * (1 - 1e-9)
    assert plan.peak_bytes >= bound.least_bytes() * (1 - 1e-9)


@settings(deadline=None, max_examples=80)
@given(cases())
def test_every_parameter_is_somewhere(case: Case) -> None:
    layout = dataclasses.replace(case.layout, sharding="replicated")
    plan = Candidate(dataclasses.replace(case, layout=layout)).plan()
    config = case.training.config
    by_role = cost.parameters(config)
    copies = config.vocab_size * config.hidden_size if config.tie_word_embeddings and layout.stages > 1 else 0
    expected = sum(by_role.values()) - by_role["experts"] + by_role["experts"] / layout.experts + copies
    assert sum(memory.weights for memory in plan.memory) == pytest.approx(2 * expected, rel=1e-6)
    assert sum(memory.optimizer for memory in plan.memory) == pytest.approx(12 * expected, rel=1e-6)


@settings(deadline=None, max_examples=60)
@given(cases())
def test_sharding_and_checkpointing_save_what_they_are_for(case: Case) -> None:
    replicated, optimizer, fsdp = (planned(case, sharding=sharding) for sharding in SHARDING)
    total = {
        name: sum(memory.optimizer for memory in plan.memory)
        for name, plan in (("replicated", replicated), ("optimizer", optimizer), ("fsdp", fsdp))
    }
    assert total["replicated"] >= total["optimizer"] == pytest.approx(total["fsdp"], rel=1e-6)
    none, selective, full = (
        Candidate(dataclasses.replace(case, layout=dataclasses.replace(case.layout, checkpointing=kind)))
        for kind in CHECKPOINTING
    )
    kept = [sum(candidate.demand.layer_kept) for candidate in (none, selective, full)]
    assert kept == sorted(kept, reverse=True)
    assert sum(full.demand.layer_s) >= sum(none.demand.layer_s) == sum(selective.demand.layer_s)


@settings(deadline=None, max_examples=60)
@given(cases(), st.integers(2, 4))
def test_more_data_ranks_compute_no_slower(case: Case, factor: int) -> None:
    assume(case.training.global_batch % (case.layout.data * factor * case.layout.micro_batch) == 0)
    more = dataclasses.replace(case.cluster, nodes=case.cluster.nodes * factor)
    wider = dataclasses.replace(case, cluster=more)
    few, many = planned(case), planned(wider, data=case.layout.data * factor)
    assert many.time.compute * factor == pytest.approx(few.time.compute)
    if case.cluster.size > 1:
        assert many.peak_bytes <= few.peak_bytes * (1 + 1e-6)


@settings(deadline=None, max_examples=60)
@given(cases(), st.integers(1, 3000))
def test_longer_sequences_take_no_less_memory_and_time(case: Case, more: int) -> None:
    training = dataclasses.replace(case.training, sequence_length=case.training.sequence_length + more)
    # Of the same stages: with more room needed another list may be chosen.
    stages = planned(case).stages
    short, long = Candidate(case).plan(stages), Candidate(dataclasses.replace(case, training=training)).plan(stages)
    assert all(a.total <= b.total for a, b in zip(short.memory, long.memory, strict=True))
    assert short.time.total <= long.time.total * (1 + 1e-9)


@settings(deadline=None, max_examples=60)
@given(cases())
def test_earlier_stages_hold_more_micro_batches(case: Case) -> None:
    accumulation, stages = case.layout.accumulation(case.training), case.layout.stages
    assert list(Candidate(case).demand.in_flight) == [min(accumulation, stages - stage) for stage in range(stages)]


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2]),
    st.sampled_from(CHECKPOINTING),
    st.integers(1, 64),
)
def test_equal_stages_take_the_papers_time(
    stages: int, data: int, micro_batch: int, checkpointing: Checkpointing, accumulation: int
) -> None:
    # A vocabulary of next to nothing, so that no stage has more to do than another.
    tokens = {"vocab_size": 3, "eod_token_id": 0, "sep_token_id": 1, "pad_token_id": 2}
    config = preset("2b", num_hidden_layers=8, **tokens)
    device = DEVICES["h200"]
    cluster = Cluster(device=device, devices_per_node=stages * data, nodes=1, wires=wires_of(device), matmul_share=0.5)
    training = TrainingStep(config=config, sequence_length=4096, global_batch=data * micro_batch * accumulation)
    layout = Layout(
        data=data,
        stages=stages,
        experts=1,
        sharding="replicated",
        micro_batch=micro_batch,
        checkpointing=checkpointing,
    )
    time = Candidate(Case(training=training, cluster=cluster, layout=layout)).plan((8 // stages,) * stages).time
    assert time.bubble == pytest.approx(time.compute * (stages - 1) / accumulation, rel=1e-3, abs=1e-6)
    # T2 counts two neighbours of each stage; T3 and T4 go over the network, here over no more than NVLink.
    pipeline = 8 * accumulation * micro_batch * 4096 * 2048 / cluster.link
    assert time.pipeline == pytest.approx(pipeline * min(2, stages - 1) / 2)
    network = cluster.network(1) * cluster.devices_per_node
    exchange = 12 * sum(cost.parameters(config).values()) * (data - 1) / data / (stages * network)
    paper = equation_4_s(ClusterRequest(training=training, cluster=cluster), layout)
    assert time.compute + time.bubble + pipeline + exchange == pytest.approx(paper, rel=1e-3)


@settings(deadline=None, max_examples=10)
@given(clusters.filter(lambda cluster: cluster.size <= 12), st.sampled_from(["2b", "nano", "uneven"]))
def test_the_best_is_the_best_of_all(cluster: Cluster, name: str) -> None:
    training = TrainingStep(config=MODELS[name], sequence_length=512, global_batch=2 * cluster.size)
    request = ClusterRequest(training=training, cluster=cluster)
    every = [candidate.plan() for candidate in request.candidates()]
    fitting = [plan for plan in every if plan.peak_bytes <= cluster.device.memory_bytes]
    ranked = rank(request)
    assert bool(ranked) == bool(fitting)
    if fitting:
        assert ranked[0].time.total == pytest.approx(min(plan.time.total for plan in fitting), rel=1e-6)
    tiny = dataclasses.replace(request, cluster=dataclasses.replace(cluster, device=cluster.device.with_memory(1)))
    assert rank(tiny) == []
    least = min(candidate.plan().peak_bytes for candidate in tiny.candidates())
    assert nearest(tiny).peak_bytes == pytest.approx(least, rel=1e-6)
