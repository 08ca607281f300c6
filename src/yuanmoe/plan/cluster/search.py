"""How a model trains on a cluster: the time of a step and its parts, the memory of every stage, and the best layout.

The schedule is 1F1B: stage p of P holds P - p micro-batches in flight, and a step takes one micro-batch through every
stage and then the slowest stage for each of the others; for equal stages that is T0 + T1 of the paper (`paper.py`).
Nothing overlaps, as the paper reckons, but FSDP's exchange with computing.
"""

import math
from dataclasses import dataclass
from functools import cached_property

from yuanmoe.plan import cost
from yuanmoe.plan.cluster import paper
from yuanmoe.plan.cluster.cluster import Cluster
from yuanmoe.plan.cluster.layout import Layout, TrainingStep, check_stages, find_layouts
from yuanmoe.plan.cluster.parts import Case, StagePart, sum_parts
from yuanmoe.plan.cluster.split import Demand, possible, spans, split
from yuanmoe.plan.cost import STATE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of a step."""

    compute: float
    """Of an average stage."""
    bubble: float
    """Waiting for the first micro-batch, for the last one, and for slower stages."""
    pipeline: float
    """Results and gradients between stages."""
    experts: float
    """Tokens on their way to experts and back."""
    gradients: float
    """Gradients and sharded weights between data ranks."""
    optimizer: float

    @property
    def total(self) -> float:
        return self.compute + self.bubble + self.pipeline + self.experts + self.gradients + self.optimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Bytes on each device of a stage at its fullest."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    runtime: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss + self.runtime


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A layout, the layers of each stage, and the resulting time and memory."""

    layout: Layout
    stages: tuple[int, ...]
    memory: tuple[StageMemory, ...]
    time: StepTime

    @property
    def peak_bytes(self) -> int:
        """Bytes of memory on each device of the fullest stage."""
        return max(memory.total for memory in self.memory)


class Candidate:
    """A layout whose layers have not been distributed over its stages yet."""

    def __init__(self, case: Case) -> None:
        config = case.training.config
        kinds = {num_experts: case.layer(num_experts) for num_experts in set(config.experts_per_layer)}
        self.case = case
        self.layers: list[StagePart] = [kinds[num_experts] for num_experts in config.experts_per_layer]
        self.around = case.around()
        self.accumulation = case.layout.accumulation(case.training)

    @cached_property
    def demand(self) -> Demand:
        """What bounds the layers of each stage."""
        num_stages = self.case.layout.stages
        return Demand(
            layer_bytes=[layer.fixed_bytes for layer in self.layers],
            layer_kept=[layer.kept for layer in self.layers],
            layer_s=[layer.micro_batch_s for layer in self.layers],
            stage_bytes=[stage.fixed_bytes for stage in self.around],
            stage_s=[stage.micro_batch_s for stage in self.around],
            in_flight=[min(self.accumulation, num_stages - stage) for stage in range(num_stages)],
        )

    def least_s(self) -> float:
        """No list of stages makes the step faster than equal shares of the work would."""
        every_s = sum(self.demand.layer_s) + sum(self.demand.stage_s)
        return every_s * (1 + (self.accumulation - 1) / self.case.layout.stages)

    def least_bytes(self) -> float:
        """No list of stages gets by with less memory than equal shares of one micro-batch each."""
        demand = self.demand
        return (sum(demand.stage_bytes) + sum(demand.layer_bytes) + sum(demand.layer_kept)) / demand.num_stages

    def fits(self, stages: tuple[int, ...] | None = None) -> bool:
        """Whether the fullest stage fits its devices, with these layers on each or with some list."""
        limit = self.case.cluster.device.memory_bytes
        return possible(self.demand, limit) if stages is None else self.plan(stages).peak_bytes <= limit

    def plan(self, stages: tuple[int, ...] | None = None) -> Plan:
        """With these layers on each stage, or the best ones."""
        stages = stages or split(self.demand, self.case.cluster.device.memory_bytes)
        whole = [
            sum_parts([around, *self.layers[first:end]])
            for around, (first, end) in zip(self.around, spans(stages), strict=True)
        ]
        return Plan(
            layout=self.case.layout,
            stages=stages,
            memory=tuple(map(_memory, whole, self.demand.in_flight)),
            time=self._time(whole),
        )

    def _time(self, stages: list[StagePart]) -> StepTime:
        A, P = self.accumulation, len(stages)
        passing = sum(stage.micro_batch_s for stage in stages)
        slowest = max(stage.micro_batch_s for stage in stages)
        gathers = A * sum(stage.gathers_s for stage in stages) / P
        return StepTime(
            compute=A * sum(stage.compute_s for stage in stages) / P,
            bubble=max(0.0, passing + (A - 1) * slowest - A * passing / P),  # rounding
            pipeline=A * self._boundary_bytes() / self.case.cluster.boundary(self.case.layout.data, P),
            experts=A * sum(stage.experts_s for stage in stages) / P,
            gradients=gathers + max(stage.reduce_s for stage in stages),
            optimizer=max(stage.update_s for stage in stages),
        )

    def _boundary_bytes(self) -> int:
        """What an inner stage gets and sends of a micro-batch, to and from both neighbours; the paper's 8 B S H."""
        neighbours = min(2, self.case.layout.stages - 1)
        return neighbours * 2 * STATE_BYTES * self.case.micro_batch_tokens * self.case.training.config.hidden_size


def _memory(stage: StagePart, in_flight: int) -> StageMemory:
    return StageMemory(
        weights=round(stage.weights),
        gradients=round(stage.gradients),
        optimizer=round(stage.optimizer),
        activations=round(stage.workspace + in_flight * stage.kept),
        loss=round(stage.loss),
        runtime=round(stage.runtime),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterRequest:
    """The model to train, the cluster to train it on, and the parts of the layout that are fixed."""

    training: TrainingStep
    cluster: Cluster
    words: tuple[str, ...] = ()
    """Of the layout."""
    stages: tuple[int, ...] | None = None
    """Layers of each stage; None leaves them open."""

    def candidates(self) -> list[Candidate]:
        """Every layout that has the fixed parts. Raises UsageError when there is none."""
        if self.stages is not None:
            check_stages(self.stages, self.training.config, self.cluster.size)
        count = () if self.stages is None else (f"pp{len(self.stages)}",)
        found = find_layouts(self.training, self.cluster.size, (*self.words, *count))
        return [Candidate(Case(training=self.training, cluster=self.cluster, layout=layout)) for layout in found]


def rank(request: ClusterRequest) -> list[Plan]:
    """The layouts that fit: the best of each number of stages and of ranks for experts, fastest first."""
    best: dict[tuple[int, int], Plan] = {}
    for candidate in sorted(request.candidates(), key=Candidate.least_s):
        kind = (candidate.case.layout.stages, candidate.case.layout.experts)
        known = best[kind].time.total if kind in best else math.inf
        if candidate.least_s() < known and candidate.fits(request.stages):
            plan = candidate.plan(request.stages)
            if plan.time.total < known:
                best[kind] = plan
    return sorted(best.values(), key=lambda plan: plan.time.total)


def nearest(request: ClusterRequest) -> Plan:
    """The layout that needs the least memory."""
    best: Plan | None = None
    for candidate in sorted(request.candidates(), key=Candidate.least_bytes):
        if best is not None and candidate.least_bytes() >= best.peak_bytes:
            break
        plan = candidate.plan(request.stages)
        if best is None or plan.peak_bytes < best.peak_bytes:
            best = plan
    assert best is not None, "a request without candidates is an error"
    return best


def model_flops(training: TrainingStep) -> float:
    """FLOPs of a step that the model needs: nothing computed twice, each token seeing half of its sequence."""
    return training.tokens * cost.training_flops(training.config, _context(training))


def model_flops_utilization(request: ClusterRequest, step_s: float) -> float:
    """Share of the cluster's matmul peak that goes into the model (MFU)."""
    peak = request.cluster.size * request.cluster.flops_per_s / request.cluster.matmul_share
    return model_flops(request.training) / (step_s * peak)


def equation_4_s(request: ClusterRequest, layout: Layout) -> float:
    """Seconds of a step with equal stages by the paper's equation, with this model's FLOPs and all its parameters."""
    training, cluster, config = request.training, request.cluster, request.training.config
    flops = cost.training_flops(config, _context(training))
    if layout.checkpointing == "full":
        flops += flops / 3 - 2 * cost.active_parameters(config)["head"]
    step = paper.Step(
        flops=layout.micro_batch * training.sequence_length * flops,
        parameters=sum(cost.parameters(config).values()),
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        sequence_length=training.sequence_length,
        micro_batch=layout.micro_batch,
        accumulation=layout.accumulation(training),
        pipeline=layout.stages,
        data=layout.data,
        flops_per_s=cluster.flops_per_s,
        link=cluster.link,
        network=cluster.network(cluster.devices_per_node) * cluster.devices_per_node,
    )
    return paper.without_tensor_parallel(step).total


def _context(training: TrainingStep) -> float:
    """Tokens that a token attends to on average."""
    return (training.sequence_length + 1) / 2
