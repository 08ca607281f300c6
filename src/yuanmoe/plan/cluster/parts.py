"""What a layer, the embedding and the head bring to a pipeline stage: bytes on one device, and seconds.

The terms of arXiv 2311.15786 (`paper.py`), with FLOPs and parameters from `cost.py`, extended to experts and their
exchange, to sharding and to checkpointing. AdamW in mixed precision: weights in bfloat16; gradients, master weights and
two moments in float32. Not here: the schedule of the stages (`search.py`).
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from yuanmoe.plan import cost
from yuanmoe.plan.activations import LOGIT_BYTES, LOSS_BLOCK, Checkpointing, activation_bytes, kept_bytes
from yuanmoe.plan.cluster.cluster import Cluster
from yuanmoe.plan.cluster.layout import Layout, Sharding, TrainingStep
from yuanmoe.plan.cost import STATE_BYTES, Weight
from yuanmoe.plan.device.planner import LAYER_S, RUNTIME_BYTES

WEIGHT_BYTES, GRADIENT_BYTES, OPTIMIZER_BYTES = 2, 4, 12
"""Of a parameter; the optimizer has a master weight and two moments."""

UPDATE_BYTES = 34
"""What updating a parameter reads and writes: the gradient twice (its norm is clipped), the optimizer's, the weight."""

COMMUNICATION_BYTES = RUNTIME_BYTES
"""Buffers of the communication library, where there are several devices."""

REDUCED_BYTES = {"replicated": 8, "optimizer": 6, "fsdp": 0}
"""What data ranks exchange of a parameter once a step: float32 gradients there and back (an all-reduce), or gradients
there and new weights back."""

GATHERED_BYTES = 8
"""What FSDP exchanges of a parameter for each micro-batch: weights for forward and backward, float32 gradients."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePart:
    """Something that a stage is made of. Bytes on one device, seconds of one micro-batch or of a step."""

    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    workspace: float = 0
    """Intermediate results of the one micro-batch that is being worked on."""
    loss: float = 0
    """Logits of a block, and the head's gradient."""
    runtime: float = 0
    kept: float = 0
    """Intermediate results of each micro-batch in flight."""
    compute_s: float = 0
    """Of a micro-batch, forward and backward."""
    experts_s: float = 0
    """Of a micro-batch: tokens on their way to experts and back."""
    gathers_s: float = 0
    """Of a micro-batch: sharded weights on their way, as far as computing does not hide it."""
    reduce_s: float = 0
    """Of a step: gradients, and new weights."""
    update_s: float = 0
    """Of a step: the optimizer."""

    @property
    def fixed_bytes(self) -> float:
        """Everything but `kept`."""
        return self.weights + self.gradients + self.optimizer + self.workspace + self.loss + self.runtime

    @property
    def micro_batch_s(self) -> float:
        return self.compute_s + self.experts_s + self.gathers_s


def sum_parts(parts: Iterable[StagePart]) -> StagePart:
    """All of them together."""
    every = list(parts)
    return StagePart(**{field.name: sum(getattr(part, field.name) for part in every) for field in fields(StagePart)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A step of training in one layout on one cluster."""

    training: TrainingStep
    cluster: Cluster
    layout: Layout

    @property
    def micro_batch_tokens(self) -> int:
        return self.layout.micro_batch * self.training.sequence_length

    def layer(self, num_experts: int) -> StagePart:
        """A layer with so many routed experts."""
        config, layout = self.training.config, self.layout
        every, routed = self._layer_parameters(num_experts)
        context = (self.training.sequence_length + 1) / 2
        flops = cost.flops_of(cost.layer_weights(config, num_experts))
        flops += cost.attention_flops(config, context) / config.num_hidden_layers
        passes = 4 if layout.checkpointing == "full" else 3
        compute_s = passes * max(LAYER_S, self._pass_s(flops, every + routed))
        own = StagePart(
            kept=self._kept(num_experts, layout.checkpointing),
            compute_s=compute_s,
            experts_s=self._experts_s(num_experts),
            gathers_s=max(0.0, self._gathers_s(every) + self._gathers_s(routed, layout.experts) - compute_s),
        )
        return sum_parts([own, self._held(every, layout.sharding), self._held(routed, layout.sharding, layout.experts)])

    def around(self) -> list[StagePart]:
        """What each stage has besides its layers: the embedding on the first, norm, head and loss on the last."""
        config, layout = self.training.config, self.layout
        embedding, head, norm = cost.outside_weights(config)
        separate = not config.tie_word_embeddings or layout.stages > 1
        # FSDP shards layers; what is outside of them stays whole but for the optimizer's share.
        sharding = "optimizer" if layout.sharding == "fsdp" else layout.sharding
        agreed = StagePart()
        if config.tie_word_embeddings and layout.stages > 1:
            # Both ends hold the matrix and agree on its gradient: an all-reduce of two ranks.
            boundary = self.cluster.boundary(layout.data, layout.stages)
            agreed = StagePart(reduce_s=GRADIENT_BYTES * head.size / boundary)
        parts = [self._everywhere()] * layout.stages
        parts[0] = sum_parts([parts[0], agreed, self._held(embedding.size, sharding)])
        parts[-1] = sum_parts(
            [parts[-1], agreed, self._held(norm.size + head.size * separate, sharding), self._loss(head)]
        )
        return parts

    def _everywhere(self) -> StagePart:
        config, layout = self.training.config, self.layout
        kinds = set(config.experts_per_layer)
        again = max(self._kept(kind, "none") - self._kept(kind, layout.checkpointing) for kind in kinds)
        # FSDP holds the layer at work and the next one whole, and the whole gradient of the former.
        whole = max(sum(self._layer_parameters(kind)) for kind in kinds) if layout.sharding == "fsdp" else 0
        return StagePart(
            weights=2 * WEIGHT_BYTES * whole,
            gradients=WEIGHT_BYTES * whole,
            workspace=again + activation_bytes(config, self.micro_batch_tokens),
            runtime=RUNTIME_BYTES + (COMMUNICATION_BYTES if self.cluster.size > 1 else 0),
        )

    def _loss(self, head: Weight) -> StagePart:
        """The loss takes its gradients at once, so that nothing of the head is computed again."""
        block = min(self.micro_batch_tokens, LOSS_BLOCK) * self.training.config.vocab_size * LOGIT_BYTES
        return StagePart(
            loss=block + GRADIENT_BYTES * head.size,
            compute_s=3 * self._pass_s(cost.flops_of([head]), head.size),
        )

    def _kept(self, num_experts: int, checkpointing: Checkpointing) -> int:
        """Bytes of intermediate results that a micro-batch leaves in a layer."""
        fused = self.cluster.device.kind != "cpu"
        each = kept_bytes(self.training.config, num_experts, checkpointing, fused_norms=fused)
        return self.micro_batch_tokens * each

    def _layer_parameters(self, num_experts: int) -> tuple[int, int]:
        """Parameters of a layer on one device: those that every data rank has, and routed experts."""
        counts = {True: 0, False: 0}
        for weight in cost.layer_weights(self.training.config, num_experts):
            counts[weight.role == "experts"] += weight.copies * weight.size
        return counts[False], counts[True] // self.layout.experts

    def _held(self, parameters: int, sharding: Sharding, stride: int = 1) -> StagePart:
        """Parameters that a device shares with every stride-th data rank: what it holds of them, what a step costs."""
        ranks = self.layout.data // stride
        share = parameters if sharding == "replicated" else parameters / ranks
        exchanged = REDUCED_BYTES[sharding] * parameters * (ranks - 1) / ranks
        return StagePart(
            weights=0 if sharding == "fsdp" else WEIGHT_BYTES * parameters,
            gradients=GRADIENT_BYTES * (share if sharding == "fsdp" else parameters),
            optimizer=OPTIMIZER_BYTES * share,
            reduce_s=exchanged / self.cluster.ring(ranks, stride),
            update_s=UPDATE_BYTES * share / self.cluster.device.bandwidth,
        )

    def _pass_s(self, flops: float, parameters: int) -> float:
        """Of a micro-batch forward: as long as its FLOPs or reading the weights takes. Backward is two of these."""
        products_s = self.micro_batch_tokens * flops / self.cluster.flops_per_s
        return max(products_s, WEIGHT_BYTES * parameters / self.cluster.device.bandwidth)

    def _experts_s(self, num_experts: int) -> float:
        config, layout = self.training.config, self.layout
        if not num_experts:
            return 0.0
        sent = self.micro_batch_tokens * config.num_experts_per_tok * config.hidden_size * STATE_BYTES
        # There and back, forward and backward; forward again where the layer is computed again.
        journeys = 6 if layout.checkpointing == "full" else 4
        return journeys * self.cluster.all_to_all_s(sent, layout.experts)

    def _gathers_s(self, parameters: int, stride: int = 1) -> float:
        if self.layout.sharding != "fsdp":
            return 0.0
        ranks = self.layout.data // stride
        return GATHERED_BYTES * parameters * (ranks - 1) / ranks / self.cluster.ring(ranks, stride)
