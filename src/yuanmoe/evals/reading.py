"""A text read by a model from one end to the other, under the settings it was loaded with or others.

The text is cut into windows of one context that share a token, so that every token but the first is scored once and
read once, in order. Not here: what is scored and how (`engine/score.py`), text (the callers have token ids).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from yuanmoe.engine.score import score
from yuanmoe.errors import UsageError
from yuanmoe.model.decoder import CausalLM


def text_windows(ids: Sequence[int], context: int) -> Iterator[Sequence[int]]:
    """Pieces of at most `context` tokens, each starting with the last token of the one before."""
    if context < 2 or len(ids) < 2:
        raise UsageError(
            f"{len(ids)} tokens in a context of {context}: at least 2 are needed, as the first is only read, not scored"
        )
    for start in range(0, len(ids) - 1, context - 1):
        yield ids[start : start + context]


def losses(model: CausalLM, ids: Sequence[int], context: int) -> Tensor:
    """Nats of every token but the first, given those before it in its window, [len(ids) - 1] float32 on the CPU.

    `context` may exceed the model's own: its configuration is often shorter than what it was trained on (M32: 4096 and
    16,384). Raises UsageError for fewer than two tokens.
    """
    longest = max(context, model.config.max_position_embeddings)
    with configured(model, max_position_embeddings=longest):
        return -torch.tensor([logprob for window in text_windows(ids, context) for logprob in score(model, window)])


@contextmanager
def configured(model: CausalLM, **changes: Any) -> Iterator[None]:
    """The model under settings that need no other weights: `rope_theta`, `rope_angles`, `max_position_embeddings`."""
    before = model.config
    model.config = model.model.config = before.replace(**changes)
    try:
        yield
    finally:
        model.config = model.model.config = before


@contextmanager
def progress(model: CausalLM, on_tokens: Callable[[float], None]) -> Iterator[None]:
    """Reports what was read after every layer of every pass, as a number of tokens: one layer of ten is a tenth."""
    layers = list(model.model.layers)

    def report(layer: torch.nn.Module, arguments: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
        on_tokens(len(arguments[0]) / len(layers))

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(report))
        yield
