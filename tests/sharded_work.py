"""What ranks do in the tests of sharded training; in a file of its own, which those processes can import."""

import dataclasses

import torch
import torch.distributed as dist

from small_models import random_model
from yuanmoe.ops.cross_entropy import head_cross_entropy
from yuanmoe.train.balance import RouterBiases
from yuanmoe.train.clip import clip_gradients
from yuanmoe.train.expert_parallel import is_expert, shard_experts
from yuanmoe.train.optim import Optimizer
from yuanmoe.train.pipeline import evaluate_in_pipeline, learn_in_pipeline, losses_in_pipeline
from yuanmoe.train.recipe import OptimizerSettings, RunSettings
from yuanmoe.train.stages import Stages
from yuanmoe.train.start import prepared
from yuanmoe.train.step import Windows, learn

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
    stages.share_tied(dict(model.named_parameters()))
    measured = evaluate_in_pipeline(model, stages, windows, 2)
    sums = losses_in_pipeline(model, stages, windows, 1)
    return learned, {name: p.grad for name, p in model.named_parameters()}, measured, sums


def pipeline_run(config, layers, windows, steps, balance, dtype):
    """Losses and norms of so many clipped AdamW steps, and this stage's weights after them."""
    model, stages = stage_of(config, layers)
    return run_of(
        model.to(dtype),
        steps,
        lambda: learn_in_pipeline(model, stages, windows, 1, balance),
        lambda optimizer: clip_in_pipeline(stages, optimizer),
        stages.own_load,
    )


def run_alone(config, windows, steps, balance, dtype):
    """The same of one process."""
    model = steered_model(config).to(dtype)
    return run_of(model, steps, lambda: learn(model, windows, 1, balance), lambda optimizer: optimizer.clip(1.0))


def clip_in_pipeline(stages, optimizer):
    stages.share_tied(optimizer.masters)
    return clip_gradients(optimizer.masters, 1.0, stages)


def run_of(model, steps, learned, clipped, own_load=list):
    # A lower rate than above: deeper models come to where rounding decides between two experts.
    optimizer, losses, norms = Optimizer(model, dataclasses.replace(ADAMW, learning_rate=3e-3)), [], []
    biases = RouterBiases(model, rate=1e-3 if model.config.router_bias else 0.0)
    for _ in range(steps):
        found = learned()
        losses.append(found.loss.item())
        norms.append(clipped(optimizer).item())
        optimizer.step(share=1.0)
        optimizer.zero_grad()
        biases.update(own_load(found.load))
    return losses, norms, {name: master.detach() for name, master in optimizer.masters.items()}


def pipelines_run(config, layers, windows, steps, balance):
    """The same of two pipelines that each learn from half of the windows and share the experts of each stage.

    Between norms and weights: which half of the experts is this rank's.
    """
    pipelines = [dist.new_group([rank, rank + 2]) for rank in range(2)]
    sides = [dist.new_group([rank, rank + 1]) for rank in (0, 2)]
    group, side = pipelines[dist.get_rank() % 2], sides[dist.get_rank() // 2]
    model, stages = stage_of(config, layers, group)
    shard_experts(model, config, side)
    own = Windows(*(part.chunk(2)[side.rank()] for part in windows[:2]))

    def learned():
        whole = {"count": windows.num_learned, "num_windows": len(windows.ids)}
        found = learn_in_pipeline(model, stages, own, 1, balance, **whole)
        dist.all_reduce(found.loss, group=side)
        return found

    def clipped(optimizer):
        sum_gradients([master for name, master in optimizer.masters.items() if not is_expert(name)], side)
        stages.share_tied(optimizer.masters)
        return clip_gradients(optimizer.masters, 1.0, stages, side)

    losses, norms, weights = run_of(model, steps, learned, clipped)
    return losses, norms, side.rank(), weights


def bad_stages(config, layers):
    try:
        Stages(config=config, layers=layers, group=dist.group.WORLD)
    except ValueError as error:
        return type(error).__name__, str(error)
    return None
