"""What quantizing did to a model, on a text: perplexity, the likeliest next tokens, and the experts that were chosen.

Both models read the same windows, one model after the other. The original one passes by layer by layer and in float32,
so that it needs no more memory than one of its layers, whatever its size; the quantized one runs as it will run.
Legend: N tokens of the windows, D hidden, V vocabulary, K chosen.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from yuanmoe.checkpoint.formats.mapping import EMBEDDING, HEAD
from yuanmoe.checkpoint.load import load_model
from yuanmoe.checkpoint.open import OpenCheckpoint
from yuanmoe.checkpoint.quantize.streamed import attend_windows, embed, open_layer
from yuanmoe.engine.score import HEAD_TOKENS
from yuanmoe.errors import CheckpointError
from yuanmoe.evals.reading import progress, text_windows
from yuanmoe.model.decoder import CausalLM
from yuanmoe.model.norm import RMSNorm
from yuanmoe.ops.products.linear import linear
from yuanmoe.plan.device.planner import PREFILL_TOKENS

CONTEXT = 2048
"""Tokens read together where the model allows it and nothing else is asked for."""

OnTokens = Callable[[float], None]
"""Hears tokens done since the last call; one layer of ten is a tenth of them."""


class TextReading(NamedTuple):
    """What a model made of a text of N tokens in windows."""

    nats: Tensor
    """Of every token that has one before it in its window."""
    likeliest: Tensor
    """The token that the model would have put there."""
    routes: list[Tensor]
    """Experts of every token, ascending, [N, K] for each layer that has any."""


def ignore_tokens(_: float) -> None:
    """Hears, and does nothing."""


@torch.inference_mode()
def read_streamed(
    source: OpenCheckpoint, pieces: Sequence[Sequence[int]], on_tokens: OnTokens = ignore_tokens
) -> TextReading:
    """The checkpoint as it is, in float32, one layer in memory at a time."""
    lengths = list(map(len, pieces))
    x, routes = embed(source, [token for piece in pieces for token in piece]), []
    for index in range(source.config.num_hidden_layers):
        layer = open_layer(source, index)
        x, routing = layer.feed_forward(attend_windows(layer, source, x, lengths))
        if routing is not None:
            routes.append(routing.experts.sort(dim=-1).values)
        source.release()
        on_tokens(len(x) / source.config.num_hidden_layers)
    norm = RMSNorm(source.config.hidden_size, source.config.rms_norm_eps)
    norm.load_state_dict({"weight": source.tensors["model.norm.weight"].read().float()})
    head = source.tensors[EMBEDDING if source.config.tie_word_embeddings else HEAD].read().float()
    judged = [_judged(lambda h: linear(h, head), *part) for part in zip(norm(x).split(lengths), pieces, strict=True)]
    return _reading(judged, routes)


@torch.inference_mode()
def read_loaded(model: CausalLM, pieces: Sequence[Sequence[int]], on_tokens: OnTokens = ignore_tokens) -> TextReading:
    """A model in memory, as it generates: with its cache, in its precision."""
    judged, routes = [], []
    with progress(model, on_tokens):
        for piece in pieces:
            cache, hidden = model.new_cache(1, len(piece)), []
            for chunk in torch.tensor(piece, device=model.device).split(PREFILL_TOKENS):
                states, routings = model.model(chunk, cache.extend([len(chunk)]))
                hidden.append(states)
                routes.append([routing.experts.sort(dim=-1).values.cpu() for routing in routings])
            judged.append(_judged(model.logits, torch.cat(hidden), piece))
    return _reading(judged, [torch.cat(layer) for layer in zip(*routes, strict=True)])


def _judged(logits: Callable[[Tensor], Tensor], hidden: Tensor, piece: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Nats of what followed, and what was likeliest to follow; few logits exist at once."""
    parts = []
    following = torch.tensor(piece[1:], device=hidden.device)
    for states, targets in zip(hidden[:-1].split(HEAD_TOKENS), following.split(HEAD_TOKENS), strict=True):
        scores = logits(states).float()
        parts.append((scores.logsumexp(-1) - scores.gather(1, targets[:, None])[:, 0], scores.argmax(-1)))
    nats, likeliest = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return nats, likeliest


def _reading(judged: Sequence[tuple[Tensor, Tensor]], routes: list[Tensor]) -> TextReading:
    nats, likeliest = (torch.cat(part) for part in zip(*judged, strict=True))
    return TextReading(nats, likeliest, routes)


def compare(before: TextReading, after: TextReading) -> dict[str, Any]:
    """The quality of `after` beside `before`, as JSON values. Raises CheckpointError where one has no likelihood."""
    for name, reading in (("original", before), ("quantized", after)):
        missing = int((~reading.nats.isfinite()).sum())
        if missing:
            raise CheckpointError(
                f"{missing:,} of {len(reading.nats):,} tokens have no likelihood under the {name} model; "
                "its weights are damaged: see yuanmoe verify"
            )
    lost = (after.nats - before.nats).double()
    error = (lost.std() / math.sqrt(len(lost))).item() if len(lost) > 1 else None
    changed = [(was != now).any(dim=-1) for was, now in zip(before.routes, after.routes, strict=True)]
    decisions, differing = sum(map(len, changed)), sum(int(layer.sum()) for layer in changed)
    return {
        "scored_tokens": len(lost),
        "perplexity_before": math.exp(before.nats.double().mean().item()),
        "perplexity_after": math.exp(after.nats.double().mean().item()),
        "perplexity_change": math.expm1(lost.mean().item()),
        "standard_error": error,
        "top1_agreement": (before.likeliest == after.likeliest).double().mean().item(),
        "routing_decisions": decisions,
        "routing_changed": differing,
        "routing_changed_by_layer": [round(layer.double().mean().item(), 6) for layer in changed],
    }


def quality(
    source: OpenCheckpoint,
    quantized: Path,
    ids: Sequence[int],
    context: int | None = None,
    on_tokens: OnTokens = ignore_tokens,
) -> dict[str, Any]:
    """Both models on a text, one after the other. Raises UsageError for fewer than two tokens."""
    context = context or min(CONTEXT, source.config.max_position_embeddings)
    pieces = list(text_windows(ids, context))
    before = read_streamed(source, pieces, on_tokens)
    after = read_loaded(load_model(quantized, device="cpu"), pieces, on_tokens)
    return {"context": context} | compare(before, after)
