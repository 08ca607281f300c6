"""What keeps the experts of a layer evenly at work: two losses, or a bias that no gradient sees.

Each needs one softmax over the router's logits, taken here; a Yuan router's logits are its scores before any softmax.
Sources: auxiliary loss arXiv 2101.03961 equations 4 to 6 (with K choices a token as in arXiv 2006.16668), z-loss arXiv
2202.08906 equation 5, loss-free bias arXiv 2408.15664 algorithm 1.
Legend: N tokens, E experts, K chosen.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from yuanmoe.model.decoder import CausalLM
from yuanmoe.model.router import Routing
from yuanmoe.train.recipe.recipe import BalanceSettings

_BIAS = "router_bias."


def balance_loss(routings: Sequence[Routing], settings: BalanceSettings) -> Tensor | None:
    """The weighted losses of all layers, each layer for itself, summed; None where nothing is asked for."""
    if not (settings.auxiliary_loss or settings.z_loss):
        return None
    parts = []
    for routing in routings:
        log_normalizer = routing.logits.logsumexp(dim=-1, keepdim=True)
        shares = (routing.logits - log_normalizer).exp()
        parts.append(settings.auxiliary_loss * auxiliary_loss(shares, routing.experts))
        parts.append(settings.z_loss * log_normalizer.square().mean())
    return torch.stack(parts).sum()


def auxiliary_loss(shares: Tensor, experts: Tensor) -> Tensor:
    """E times the sum over experts of their share of the choices `experts` [N, K] and their mean of `shares` [N, E].

    1 where either is even; the gradient flows through `shares`, the router's softmax.
    """
    E = shares.shape[1]
    load = torch.bincount(experts.flatten(), minlength=E) / experts.numel()
    return E * (load.to(shares.dtype) * shares.mean(dim=0)).sum()


class RouterBiases:
    """The biases of a model's routers, moved after each step towards an even load; nothing where it has none.

    The sums are kept in float32; the model computes with what its dtype makes of them.
    """

    def __init__(self, model: CausalLM, rate: float) -> None:
        self._rate = rate
        self._buffers = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith(".router.bias")]
        self._sums = {name: buffer.float() for name, buffer in self._buffers}

    @torch.no_grad()
    def update(self, load: Sequence[Tensor]) -> None:
        """One step after the choices of a batch, [E] for each layer: down where there were more than the mean."""
        if not self._rate:
            return
        for (name, buffer), counts in zip(self._buffers, load, strict=True):
            self._sums[name] += self._rate * (counts.float().mean() - counts).sign()
            buffer.copy_(self._sums[name])

    def tensors(self) -> dict[str, Tensor]:
        """The sums, by name."""
        return {f"{_BIAS}{name}": tensor for name, tensor in self._sums.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes what `tensors` gave."""
        for name, buffer in self._buffers:
            self._sums[name] = tensors[f"{_BIAS}{name}"].to(buffer.device, copy=True)
            buffer.copy_(self._sums[name])
