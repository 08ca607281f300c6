"""AdamW (arXiv 1711.05101) over float32 masters: what moves the parameters, in whatever precision the model computes.

A parameter in float32 is its own master. One in bfloat16 has a master beside it, which sums its gradients and holds
what a step adds below its precision: a weight near 1 cannot take a step below 1/256 in bfloat16.
Not here: the schedule, sharding (a function that takes a model and returns one comes before this).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from yuanmoe.train.recipe import OptimizerSettings

_MASTER, _MEAN, _SQUARE = "master.", "exp_avg.", "exp_avg_sq."


class Optimizer:
    """AdamW over the parameters of a model that want a gradient."""

    def __init__(self, model: nn.Module, settings: OptimizerSettings) -> None:
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = {name: _master(parameter) for name, parameter in self._parameters.items()}
        self._apart = [name for name, master in self.masters.items() if master is not self._parameters[name]]
        self._learning_rate = settings.learning_rate
        self._adamw = torch.optim.AdamW(
            param_groups(self.masters, settings),
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.epsilon,
            fused=True,
        )

    def clip(self, longest: float) -> Tensor:
        """Shortens the gradient of all parameters to `longest`; its norm before that."""
        return nn.utils.clip_grad_norm_(self.masters.values(), longest)

    @torch.no_grad()
    def step(self, share: float) -> None:
        """Moves the parameters with that share of the highest learning rate."""
        for group in self._adamw.param_groups:
            group["lr"] = self._learning_rate * share * group["rate"]
        self._adamw.step()
        self._publish()

    def zero_grad(self) -> None:
        """Forgets the gradients, and gives their memory back."""
        self._adamw.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """All that a step depends on besides the parameters themselves, by name; empty before the first step."""
        found: dict[str, Tensor] = {f"{_MASTER}{name}": self.masters[name] for name in self._apart}
        for name, master in self.masters.items():
            state = self._adamw.state.get(master, {})
            if state:
                found |= {f"{_MEAN}{name}": state["exp_avg"], f"{_SQUARE}{name}": state["exp_avg_sq"]}
        return found

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Takes what `tensors` gave after that many steps."""
        for name, master in self.masters.items():
            if f"{_MASTER}{name}" in tensors:
                master.copy_(tensors[f"{_MASTER}{name}"])
            if steps:
                self._adamw.state[master] = {
                    "step": torch.tensor(float(steps), device=master.device),
                    "exp_avg": tensors[f"{_MEAN}{name}"].to(master.device, copy=True),
                    "exp_avg_sq": tensors[f"{_SQUARE}{name}"].to(master.device, copy=True),
                }
        self._publish()

    def _publish(self) -> None:
        """Rounds the masters into the parameters that are none themselves."""
        for name in self._apart:
            self._parameters[name].copy_(self.masters[name])


def param_groups(parameters: Mapping[str, nn.Parameter], settings: OptimizerSettings) -> list[dict[str, object]]:
    """Four kinds of parameters; the key `rate` of a group is its multiple of the learning rate.

    Norms and biases do not decay: they have nothing to shrink towards 0 for. Embedding and head do where the released
    training is repeated (Megatron spares vectors alone); for a rare token's row decay would do little else.
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
        members[_kind(name, parameter)].append(parameter)
    return [{"params": members[kind], **values} for kind, values in kinds.items() if members[kind]]


def _kind(name: str, parameter: nn.Parameter) -> str:
    if name == "model.embed_tokens.weight":
        return "embedding"
    if name == "lm_head.weight":
        return "head"
    return "vector" if parameter.ndim == 1 else "matrix"


def _master(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter itself, or a float32 copy that takes over its gradients as soon as they are there."""
    if parameter.dtype == torch.float32:
        return parameter
    master = nn.Parameter(parameter.detach().float())

    def take(source: Tensor) -> None:
        assert source.grad is not None, "the hook runs after a gradient was accumulated"
        if master.grad is None:
            master.grad = source.grad.float()
        else:
            master.grad += source.grad
        source.grad = None

    parameter.register_post_accumulate_grad_hook(take)
    return master
