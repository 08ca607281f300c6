"""Pipeline parallelism: micro-batches that pass through the stages of a model, each on a rank, forward and backward.

Every rank knows all windows of the step; hidden states go to the next stage and their gradients come back. Losses that
balance experts are added where their layers are, and only numbers are shared at the end. The schedules are 1F1B (arXiv
2104.04473 section 2.2), under which stage s of P holds up to P - s micro-batches at once, and GPipe (arXiv 1811.06965),
which holds all. Own loops rather than torch's: docs/decisions/0004-own-pipeline-schedule.md.

The ranks of a pipeline must call each function together, with the same arguments but for their stage of the model.
Dropout follows torch's generator on each rank: to be independent across stages it wants seeds of their own.
Not here: what a stage is (`stages.py`), optimizers, data parallelism.
Legend: N tokens of a micro-batch, D hidden, P stages.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import P2POp

from yuanmoe.model.decoder import CausalLM
from yuanmoe.train.parallel.stages import Stages, state_dtype
from yuanmoe.train.recipe.recipe import BalanceSettings
from yuanmoe.train.steps.balance import balance_loss
from yuanmoe.train.steps.step import Learned, StepSize, Windows, expert_load

Schedule = Literal["1f1b", "gpipe"]


class PipelineAction(NamedTuple):
    """One thing that a stage does: the forward or the backward pass of a micro-batch."""

    kind: Literal["forward", "backward"]
    micro_batch: int


def passes(schedule: Schedule, stage: int, num_stages: int, micro_batches: int) -> Iterator[PipelineAction]:
    """What a stage does, in order: some forward passes ahead, then backward passes as soon as they can be."""
    ahead = micro_batches if schedule == "gpipe" else min(num_stages - stage - 1, micro_batches)
    for turn in range(micro_batches + ahead):
        if turn < micro_batches:
            yield PipelineAction("forward", turn)
        if turn >= ahead:
            yield PipelineAction("backward", turn - ahead)


class Mail:
    """Tensors between this rank's stage and its neighbours.

    A stage sends while it receives, in one batch: two that both send first would wait for each other forever.
    """

    def __init__(self, stages: Stages) -> None:
        self._stages = stages
        self._leaving: list[P2POp] = []

    def send(self, tensor: Tensor, stage: int) -> None:
        """Leaves with the next message, at the latest when mail is delivered."""
        self._leaving.append(self._stages.sending(tensor.contiguous(), stage))

    def receive(self, empty: Tensor, stage: int) -> Tensor:
        """`empty`, filled by another stage."""
        self.deliver(self._stages.receiving(empty, stage))
        return empty

    def deliver(self, *more: P2POp) -> None:
        """Waits until everything has left, and `more` has arrived."""
        messages, self._leaving = [*self._leaving, *more], []
        for message in dist.batch_isend_irecv(messages) if messages else ():
            message.wait()


class _Flight(NamedTuple):
    """A micro-batch between its forward and its backward pass."""

    incoming: Tensor | None
    outgoing: Tensor
    """On the last stage the loss."""
    balance: Tensor | None


class _Step:
    """One step of one stage: its micro-batches in flight, and what they said."""

    def __init__(self, model: CausalLM, stages: Stages, parts: Sequence[Windows], count: int) -> None:
        self.losses = [torch.zeros((), device=parts[0].ids.device)] * len(parts)
        """Of micro-batches; 0 on all stages but the last."""
        self.extra = torch.zeros((), device=parts[0].ids.device)
        self.load: list[Tensor] = []
        self._model, self._stages, self._parts, self._count = model, stages, parts, count
        self._mail = Mail(stages)
        self._flying: dict[int, _Flight] = {}

    def forward(self, number: int, balance: BalanceSettings, num_windows: int) -> None:
        """Takes a micro-batch through this stage and on to the next; its balance counts for its share of windows."""
        part, stages = self._parts[number], self._stages
        incoming = self._incoming(part)
        outgoing, routings = stages.forward(self._model, incoming, part, self._count)
        extra = balance_loss(routings, balance) if routings else None
        if extra is not None:
            extra = extra * (len(part.ids) / num_windows)
            self.extra = self.extra + extra.detach()
        counts = [expert_load(routing) for routing in routings]
        self.load = [before + now for before, now in zip(self.load, counts, strict=True)] if self.load else counts
        self._flying[number] = _Flight(incoming, outgoing, extra)
        self._pass_on(number, outgoing)

    def backward(self, number: int) -> None:
        """Adds the gradient of a micro-batch to this stage's weights and sends it on to the stage before."""
        incoming, outgoing, extra = self._flying.pop(number)
        gradient = self._gradient(outgoing)
        if extra is None:
            torch.autograd.backward([outgoing], [gradient])
        else:
            torch.autograd.backward([outgoing, extra], [gradient, None])
        if incoming is not None:
            assert incoming.grad is not None, "layers add to what they are given"
            self._mail.send(incoming.grad, self._stages.index - 1)

    @torch.inference_mode()
    def measure(self, number: int) -> None:
        """The forward pass alone. What it makes leaves at once: nobody sends back, so nobody waits in a circle."""
        part = self._parts[number]
        outgoing, _ = self._stages.forward(self._model, self._incoming(part), part, self._count)
        self._pass_on(number, outgoing)
        self._mail.deliver()

    def finish(self) -> None:
        """Sends what is left."""
        self._mail.deliver()

    def _incoming(self, part: Windows) -> Tensor | None:
        if self._stages.is_first:
            return None
        shape = (part.ids[:, 1:].numel(), self._stages.config.hidden_size)
        empty = torch.empty(shape, dtype=state_dtype(self._model), device=part.ids.device)
        return self._mail.receive(empty, self._stages.index - 1).requires_grad_(torch.is_grad_enabled())

    def _gradient(self, outgoing: Tensor) -> Tensor | None:
        return None if self._stages.is_last else self._mail.receive(torch.empty_like(outgoing), self._stages.index + 1)

    def _pass_on(self, number: int, outgoing: Tensor) -> None:
        if self._stages.is_last:
            self.losses[number] = outgoing.detach()
        else:
            self._mail.send(outgoing.detach(), self._stages.index + 1)


def learn_in_pipeline(
    model: CausalLM,
    stages: Stages,
    windows: Windows,
    windows_at_once: int,
    balance: BalanceSettings,
    *,
    schedule: Schedule = "1f1b",
    step: StepSize | None = None,
) -> Learned:
    """Adds the gradient of the mean loss of `windows` to this stage's weights; what `step.learn` returns, on each rank.

    Where they are a pipeline's part of a `step`, the sums over pipelines are what one would say.
    """
    step = step or StepSize(len(windows.ids), windows.num_learned)
    parts = list(windows.split(windows_at_once))
    work = _Step(model, stages, parts, max(step.learned, 1))
    for kind, number in passes(schedule, stages.index, stages.count, len(parts)):
        if kind == "forward":
            work.forward(number, balance, step.windows)
        else:
            work.backward(number)
    work.finish()
    return _shared(stages, work)


def losses_in_pipeline(model: CausalLM, stages: Stages, windows: Windows, windows_at_once: int) -> list[float]:
    """The losses of `windows`, some at a time, summed over the tokens that are learned; without dropout."""
    training = model.training
    model.eval()
    parts = list(windows.split(windows_at_once))
    step = _Step(model, stages, parts, count=1)
    for number in range(len(parts)):
        step.measure(number)
    model.train(training)
    losses = torch.stack(step.losses)
    dist.all_reduce(losses, group=stages.group)
    return losses.tolist()


def evaluate_in_pipeline(model: CausalLM, stages: Stages, windows: Windows, windows_at_once: int = 32) -> float:
    """Mean loss of `windows` in nats a learned token, without dropout."""
    return math.fsum(losses_in_pipeline(model, stages, windows, windows_at_once)) / max(windows.num_learned, 1)


def _shared(stages: Stages, step: _Step) -> Learned:
    """What the stages found, put together on all ranks."""
    each, own = stages.config.experts_per_layer, stages.own_layers
    elsewhere = [torch.zeros(sum(part), device=step.extra.device) for part in (each[: own.start], each[own.stop :])]
    losses = torch.stack([torch.stack(step.losses).sum(), step.extra])
    # One message for all: float64 holds counts of choices exactly.
    found = torch.cat([part.double() for part in (losses, elsewhere[0], *step.load, elsewhere[1])])
    dist.all_reduce(found, group=stages.group)
    loss, extra = found[:2].float()
    load = found[2:].long().split([experts for experts in each if experts])
    return Learned(loss=loss, balance_loss=extra, load=list(load))
