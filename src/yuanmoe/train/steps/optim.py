"""AdamW (arXiv 1711.05101) over float32 masters: what moves the parameters, in whatever precision the model computes.

A parameter in float32 is its own master. One in bfloat16 has a master beside it, which sums its gradients and holds
what a step adds below its precision: a weight near 1 cannot take a step below 1/256 in bfloat16.
Which part of a master a rank holds is in `part.py`. Not here: the schedule.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from yuanmoe.train.parallel.part import part_of
from yuanmoe.train.parallel.ranks import ALONE, Ranks
from yuanmoe.train.recipe.recipe import OptimizerSettings
from yuanmoe.train.state.stored import Stored, state_key

SUMMED_AT_ONCE = 2**22
"""Elements of a gradient that are in float64 at a time."""

_MASTER, _MEAN, _SQUARE = "master.", "exp_avg.", "exp_avg_sq."


class Optimizer:
    """AdamW over the parameters of a model that want a gradient; each rank moves its part of them."""

    def __init__(
        self,
        model: nn.Module,
        settings: OptimizerSettings,
        ranks: Ranks = ALONE,
        computed_in: torch.dtype = torch.float32,
    ) -> None:
        """`computed_in` is what the model's weights are rounded to where they are sharded."""
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._ranks = ranks
        self._parts = {name: part_of(name, parameter, ranks, computed_in) for name, parameter in parameters.items()}
        self.masters = {name: part.master for name, part in self._parts.items()}
        self._learning_rate = settings.learning_rate
        self._adamw = torch.optim.AdamW(
            param_groups(parameters, settings, self.masters),
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.epsilon,
            fused=True,
        )

    def clip(self, longest: float) -> Tensor:
        """Sums the gradient over all ranks and shortens it to `longest`; its norm before that."""
        for part in self._parts.values():
            part.reduce()
        norm = self._norm()
        nn.utils.clip_grads_with_norm_(self.masters.values(), longest, norm)
        return norm

    @torch.no_grad()
    def step(self, share: float) -> None:
        """Moves the parameters with that share of the highest learning rate."""
        for group in self._adamw.param_groups:
            group["lr"] = self._learning_rate * share * group["rate"]
        self._adamw.step()
        self._publish()

    def zero_grad(self) -> None:
        """Forgets the gradients, and gives their memory back."""
        for part in self._parts.values():
            part.forget()

    def tensors(self) -> dict[str, Tensor]:
        """All that a step depends on besides the parameters themselves, by key; no moments before the first step.

        Of what several ranks hold, one has it here; a range of a tensor is flat, and its key says where it begins.
        """
        found: dict[str, Tensor] = {}
        for name, part in self._parts.items():
            state = self._adamw.state.get(part.master, {})
            held = {_MASTER: part.master} if part.rounds else {}
            held |= {_MEAN: state["exp_avg"], _SQUARE: state["exp_avg_sq"]} if state else {}
            for kind, tensor in held.items() if part.writes and part.master.numel() else ():
                found[state_key(kind + name, part.start if part.is_range else None)] = tensor.detach()
        return {key: tensor.flatten() if "@" in key else tensor for key, tensor in found.items()}

    @torch.no_grad()
    def load(self, stored: Stored, steps: int) -> None:
        """Takes what `tensors` of all ranks gave after that many steps, however many there were."""
        for name, part in self._parts.items():
            master = part.master
            if _MASTER + name in stored:
                master.copy_(stored.part(_MASTER + name, part.start, master.numel()).view_as(master))
            if steps and master.numel():
                mean, square = (
                    stored.part(kind + name, part.start, master.numel()).view_as(master).to(master.device, copy=True)
                    for kind in (_MEAN, _SQUARE)
                )
                taken = torch.tensor(float(steps), device=master.device)
                self._adamw.state[master] = {"step": taken, "exp_avg": mean, "exp_avg_sq": square}
        self._publish()

    def _norm(self) -> Tensor:
        """Of the gradient of all parameters, each element counted once."""
        gradients = [(part.master.grad, part.holders) for part in self._parts.values() if part.master.grad is not None]
        squares = [square_sum(gradient) / holders for gradient, holders in gradients]
        return self._ranks.sum(torch.stack(squares).sum()).sqrt().float()

    @torch.no_grad()
    def _publish(self) -> None:
        for part in self._parts.values():
            part.publish()


def square_sum(values: Tensor) -> Tensor:
    """The sum of squares as float64: a sum in float32 is off by more than 1e-6 at 1e9 elements; in chunks of memory."""
    flat = values.detach().flatten()
    return torch.stack([chunk.double().square().sum() for chunk in flat.split(SUMMED_AT_ONCE)]).sum()


def param_groups(
    parameters: Mapping[str, nn.Parameter],
    settings: OptimizerSettings,
    masters: Mapping[str, nn.Parameter] | None = None,
) -> list[dict[str, object]]:
    """Four kinds of parameters; the key `rate` of a group is its multiple of the learning rate.

    Norms and biases do not decay: they have nothing to shrink towards 0 for. Embedding and head do where the released
    training is repeated (Megatron spares vectors alone); for a rare token's row decay would do little else. `masters`,
    those that are not empty, take the place of parameters.
    """
    outside = settings.weight_decay if settings.decay_embedding else 0.0
    kinds = {
        "matrix": {"rate": 1.0, "weight_decay": settings.weight_decay},
        "vector": {"rate": 1.0, "weight_decay": 0.0},
        "embedding": {"rate": settings.embedding_rate, "weight_decay": outside},
        "head": {"rate": settings.head_rate, "weight_decay": outside},
    }
    members: dict[str, list[nn.Parameter]] = {kind: [] for kind in kinds}
    for name, parameter in parameters.items():
        moved = (masters or parameters)[name]
        if moved.numel():
            members[_kind(name, parameter)].append(moved)
    return [{"params": members[kind], **values} for kind, values in kinds.items() if members[kind]]


def _kind(name: str, parameter: nn.Parameter) -> str:
    if name == "model.embed_tokens.weight":
        return "embedding"
    if name == "lm_head.weight":
        return "head"
    return "vector" if parameter.ndim == 1 else "matrix"
