"""What ranks do in the tests of sharded training; in a file of its own, which those processes can import."""

import torch
import torch.distributed as dist

from small_models import random_model
from yuanmoe.ops.cross_entropy import head_cross_entropy
from yuanmoe.train.parallel.expert_parallel import is_expert, shard_experts
from yuanmoe.train.parallel.pipeline import evaluate_in_pipeline, learn_in_pipeline, losses_in_pipeline
from yuanmoe.train.parallel.stages import Stages
from yuanmoe.train.recipe.recipe import OptimizerSettings, RunSettings
from yuanmoe.train.start.model import prepared
from yuanmoe.train.steps.optim import Optimizer

ADAMW = OptimizerSettings(learning_rate=1e-2, weight_decay=0.1)


def steered_model(config, biases=()):
    """Random weights; `biases` of the first experts of each layer's router, far above or below what scores differ."""
    model = random_model(config).train()
    for name, buffer in model.named_buffers():
        if name.endswith(".router.bias"):
            buffer[: len(biases)] = torch.tensor(biases)
    return model


def rank_loss(model, windows, tokens):
    """What these windows add to the mean loss of `tokens` tokens, and the routings."""
    hidden, routings = model.read(windows[:, :-1])
    targets = windows[:, 1:].flatten()
    loss = head_cross_entropy(hidden.flatten(0, 1), model.whole_head(hidden.dtype), targets)
    return loss * (len(targets) / tokens), routings


def expert_parallel_step(config, windows, biases):
    """Logits, routings and gradients of this rank's share of `windows`."""
    model, group = steered_model(config, biases), dist.group.WORLD
    shard_experts(model, config, group)
    own = windows.chunk(group.size())[group.rank()]
    loss, routings = rank_loss(model, own, windows[:, 1:].numel())
    loss.backward()
    with torch.no_grad():
        logits = model(own[:, :-1]).logits
    return logits, routings_of(routings), {name: p.grad for name, p in model.named_parameters()}


def routings_of(routings):
    return [tuple(part.detach() for part in routing) for routing in routings]


def expert_parallel_losses(config, windows, steps):
    """Mean losses of so many AdamW steps on `windows`, this rank learning from its share."""
    model, group = steered_model(config), dist.group.WORLD
    shard_experts(model, config, group)
    own, losses = windows.chunk(group.size())[group.rank()], []
    optimizer = Optimizer(model, ADAMW)
    for _ in range(steps):
        loss, _ = rank_loss(model, own, windows[:, 1:].numel())
        loss.backward()
        sum_gradients([p for name, p in model.named_parameters() if not is_expert(name)])
        optimizer.step(share=1.0)
        optimizer.zero_grad()
        total = loss.detach()
        dist.all_reduce(total)
        losses.append(total.item())
    return losses


def sum_gradients(parameters, group=None):
    """Over the ranks, all at once: messages are slower than these tests' arithmetic."""
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
    dist.all_reduce(flat, group=group)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(part.view_as(parameter))


def losses_alone(config, windows, steps):
    """The same of one process that learns from all of them."""
    model, losses = steered_model(config), []
    optimizer = Optimizer(model, ADAMW)
    for _ in range(steps):
        loss, _ = rank_loss(model, windows, windows[:, 1:].numel())
        loss.backward()
        optimizer.step(share=1.0)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def mixture_of_no_tokens(config, tokens):
    """Output and gradients of a layer with experts of which rank 1 has no token."""
    model, group = steered_model(config), dist.group.WORLD
    layer = shard_experts(model, config, group).model.layers[0].mlp
    x = (tokens if group.rank() == 0 else tokens[:0]).clone().requires_grad_()
    y, _ = layer(x)
    y.square().sum().backward()
    return y.detach(), x.grad, layer.experts.gate_up_proj.grad


def bad_groups(config):
    try:
        shard_experts(random_model(config), config, dist.group.WORLD)
    except ValueError as error:
        return type(error).__name__, str(error)
    return None


# --- pipelines --------------------------------------------------------------------------------------------------------


def stage_of(config, layers, group=None, biases=()):
    """This rank's stage of a model with random weights."""
    stages = Stages(config=config, layers=layers, group=group or dist.group.WORLD)
    return stages.cut(steered_model(config, biases)), stages


def checkpointed(model, wanted):
    return prepared(model, RunSettings(activation_checkpointing=wanted))


def pipeline_step(config, layers, windows, balance, schedule, twice):
    """What this rank's stage learned from `windows`, two at a time, its gradients, and the same windows measured."""
    model, stages = stage_of(config, layers)
    checkpointed(model, twice)
    learned = learn_in_pipeline(model, stages, windows, 2, balance, schedule=schedule)
    measured = evaluate_in_pipeline(model, stages, windows, 2)
    sums = losses_in_pipeline(model, stages, windows, 1)
    return learned, {name: p.grad for name, p in model.named_parameters()}, measured, sums


def bad_stages(config, layers):
    try:
        Stages(config=config, layers=layers, group=dist.group.WORLD)
    except ValueError as error:
        return type(error).__name__, str(error)
    return None
