"""The length of a gradient that lies on several ranks, stage by stage and expert by expert, and cutting it."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from yuanmoe.train.expert_parallel import is_expert
from yuanmoe.train.stages import Stages


@torch.no_grad()
def clip_gradients(
    masters: Mapping[str, nn.Parameter],
    longest: float,
    stages: Stages | None = None,
    experts: ProcessGroup | None = None,
) -> Tensor:
    """Shortens the gradient of all weights of the model to `longest`; its norm before that.

    `masters` are this rank's, by the names of the weights; their gradients are complete. The rest of the model is on
    other stages, and its other experts on other ranks of `experts`.
    """
    device = next(iter(masters.values())).device
    squares = torch.zeros(2, device=device)
    for name, master in masters.items():
        if master.grad is not None and (stages is None or stages.counts(name)):
            squares[int(is_expert(name))] += master.grad.square().sum()
    if experts is not None:
        dist.all_reduce(squares[1:], group=experts)
    square = squares.sum()
    if stages is not None:
        dist.all_reduce(square, group=stages.group)
    norm = square.sqrt()
    nn.utils.clip_grads_with_norm_(masters.values(), longest, norm)
    return norm
