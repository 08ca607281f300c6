"""The model that a recipe starts with, and what is done to it from outside before it learns."""

import dataclasses
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from yuanmoe.checkpoint.formats.mapping import layout
from yuanmoe.checkpoint.formats.native_config import parse_dtype
from yuanmoe.checkpoint.load import load_state
from yuanmoe.checkpoint.open import OpenCheckpoint
from yuanmoe.config import ModelConfig
from yuanmoe.errors import UsageError
from yuanmoe.model.decoder import CausalLM, DecoderLayer
from yuanmoe.train.recipe.recipe import Recipe, RunSettings

_COMPUTED = ("rope_theta", "rope_angles", "packing", "attention_dropout")
"""Fields of a model that change what is computed and no weight."""


def new_model(recipe: Recipe, device: torch.device | str = "cpu") -> CausalLM:
    """The recipe's model with random weights that depend on its seed alone."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(recipe.run.seed)
        model = CausalLM(recipe.model).initialize()
        if recipe.run.embedding_std is not None:
            nn.init.normal_(model.model.embed_tokens.weight, std=recipe.run.embedding_std)
    return prepared(model.to(device, parse_dtype(recipe.run.dtype)), recipe.run)


def on_weights(recipe: Recipe, weights: ModelConfig) -> Recipe:
    """The recipe for a model whose weights are there already.

    Sizes are those of the weights. What the recipe says beyond the defaults of how to compute with them stays, and so
    does a longer context.
    """
    own = recipe.model
    defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    kept = {name: getattr(own, name) for name in _COMPUTED if getattr(own, name) != defaults[name]}
    context = max(own.max_position_embeddings, weights.max_position_embeddings)
    return dataclasses.replace(
        recipe,
        model=weights.replace(
            **kept, max_position_embeddings=context, router_bias=own.router_bias or weights.router_bias
        ),
    )


def loaded_model(recipe: Recipe, source: OpenCheckpoint, device: torch.device | str = "cpu") -> CausalLM:
    """The recipe's model with the weights of a checkpoint.

    Raises UsageError for weights in few bits, and for those of a model of other sizes.
    """
    if source.precision is not None:
        raise UsageError(
            f"{source.path} holds weights of {source.precision.bits} bits, which have no gradient; "
            "start from the checkpoint that they were made of, or adapt them with LoRA: yuanmoe train m32-lora --init"
        )
    table = layout(recipe.model).native
    if not layout(source.config).native.items() <= table.items():
        raise UsageError(
            f"the weights in {source.path} do not fit the recipe's model, whose sizes differ; leave model.* as it was"
        )
    dtype = parse_dtype(recipe.run.dtype)
    state = {name: tensor.to(device, copy=True) for name, tensor in load_state(source, dtype=dtype).items()}
    for name, shape in table.items():
        if name not in state:
            assert name.endswith(".router.bias"), f"{name} is new, though only biases may be"
            state[name] = torch.zeros(shape, dtype=dtype, device=device)
    with torch.device("meta"):
        model = CausalLM(recipe.model)
    model.load_state_dict(state, assign=True)
    return prepared(model.requires_grad_(), recipe.run)


def prepared(model: CausalLM, run: RunSettings) -> CausalLM:
    """`model` as the run wants it: the attention half of its layers compiled, its layers computed twice to keep less.

    Parameters and names stay the same.
    """
    for layer in model.model.layers:
        if not isinstance(layer, DecoderLayer):
            continue  # Another stage of a pipeline has it.
        if run.compile:
            # The other half sorts tokens by expert: its sizes are data, and torch traces its grouped product in
            # bfloat16 alone.
            layer.attend = torch.compile(layer.attend)
        if run.activation_checkpointing:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return model
