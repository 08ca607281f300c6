"""The paper's model of a training step (arXiv 2311.15786, equations 1 to 4): the base of `search.py`.

Legend, as there: A micro-batches a step, B sequences of one, L layers, S tokens, H hidden, V vocabulary; P, T, D ranks
of pipeline, tensor and data parallelism; G FLOPs of a micro-batch, W parameters. The tables of the paper come out if
three things are read otherwise than printed:
- T0 of equations 3 and 4 lacks the factor A.
- G of a GPT has 1 + 1/(6H) where the attention scores make it 1 + S/(6H).
- The S in W of Yuan is not the sequence but the inner width of LFA, H/2 (both are 4096 in the 102B model): then W is
  the number of parameters of every dense Yuan model, short of the last norm.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A dense model by its sizes."""

    num_layers: int
    hidden_size: int
    vocab_size: int
    filtered: bool
    """Yuan with LFA and SwiGLU; otherwise GPT."""

    def flops(self, micro_batch: int, sequence_length: int) -> float:
        """G: forward, recomputed forward and backward of a micro-batch; neither LFA's matrices nor the head count."""
        H, S = self.hidden_size, sequence_length
        per_layer = 128 * (1 + S / (8 * H)) if self.filtered else 96 * (1 + S / (6 * H))
        return per_layer * micro_batch * self.num_layers * S * H**2

    def parameters(self) -> float:
        """W."""
        L, H, V = self.num_layers, self.hidden_size, self.vocab_size
        if not self.filtered:
            return 12 * L * H**2 * (1 + 13 / (12 * H) + V / (12 * L * H))
        inner = H // 2
        return 16 * L * H**2 * (1 + (1 + inner) / (4 * H) + inner / (16 * H**2) + V / (16 * L * H))


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step: what is computed, by how many, over which wires."""

    flops: float
    """G."""
    parameters: float
    """W."""
    num_layers: int
    hidden_size: int
    sequence_length: int
    micro_batch: int
    accumulation: int
    """A."""
    pipeline: int
    tensor: int = 1
    data: int
    flops_per_s: float
    """F: what a device keeps up."""
    link: float
    """Bytes a second between two devices of a node."""
    network: float
    """Bytes a second between nodes, all cards of a node together (n_net BW_net)."""

    @property
    def micro_batches_size(self) -> float:
        """A B S H: numbers that cross a boundary between stages in one direction."""
        return self.accumulation * self.micro_batch * self.sequence_length * self.hidden_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds of a step, T0 to T4."""

    compute: float
    bubble: float
    pipeline: float
    exchange: float
    """T3: tensor parallelism's in equations 1 and 2, that of the sharded optimizer in 3 and 4."""
    gradients: float

    @property
    def total(self) -> float:
        return self.compute + self.bubble + self.pipeline + self.exchange + self.gradients


def three_dimensional(step: Step, *, filtered: bool) -> Times:
    """Pipeline, tensor and data parallelism: equation 1 of a GPT, equation 2 of a Yuan with LFA."""
    P, T = step.pipeline, step.tensor
    crossings = (64 if filtered else 48) * step.num_layers * (T - 1)
    return _times(
        step, pipeline_bandwidth=step.network, exchange=crossings / (P * T * step.link) * step.micro_batches_size
    )


def without_tensor_parallel(step: Step) -> Times:
    """Pipeline and data parallelism with a sharded optimizer: equations 3 and 4, whose G and W differ alone."""
    exchange = step.parameters * 8 * _others(step.data) / (step.pipeline * step.network)
    return _times(step, pipeline_bandwidth=step.link, exchange=exchange)


def _times(step: Step, *, pipeline_bandwidth: float, exchange: float) -> Times:
    compute = step.accumulation * step.flops / (step.pipeline * step.tensor * step.flops_per_s)
    return Times(
        compute=compute,
        bubble=compute * (step.pipeline - 1) / step.accumulation,
        pipeline=8 * step.micro_batches_size / pipeline_bandwidth,
        exchange=exchange,
        gradients=step.parameters * 4 * _others(step.data) / (step.pipeline * step.network),
    )


def _others(ranks: int) -> float:
    """Share of the weights that belongs to the other ranks."""
    return (ranks - 1) / ranks
