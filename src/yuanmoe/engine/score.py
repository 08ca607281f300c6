"""How likely a model finds given tokens: their log-probabilities, in bounded memory.

A text longer than the context is read in windows that overlap by half, and each token is scored in the first window
that holds it: past the first window every token sees at least half a context.
Legend: N tokens of a pass, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from yuanmoe.errors import UsageError
from yuanmoe.model.decoder import CausalLM
from yuanmoe.plan.device.planner import PREFILL_TOKENS

HEAD_TOKENS = 128
"""Tokens whose logits exist at once: 69 MB in float32 for a vocabulary of 135,040."""


@torch.inference_mode()
def score(model: CausalLM, ids: Sequence[int], *, chunk_size: int = PREFILL_TOKENS) -> list[float]:
    """The log-probability of every token but the first, given those before it. Raises UsageError for fewer than two."""
    if len(ids) < 2:
        raise UsageError(f"{len(ids)} tokens: at least 2 are needed, as the first is only read, not scored")
    logprobs = []
    for start, first, stop in windows(len(ids), model.config.max_position_embeddings):
        window = _score_window(model, ids[start:stop], chunk_size)
        logprobs += window[first - start - 1 :]
    return logprobs


def _score_window(model: CausalLM, ids: Sequence[int], chunk_size: int) -> list[float]:
    tokens = torch.tensor(ids, device=model.device)
    cache = model.new_cache(1, len(ids))
    logprobs = []
    for chunk, following in zip(tokens[:-1].split(chunk_size), tokens[1:].split(chunk_size), strict=True):
        hidden, _ = model.model(chunk, cache.extend([len(chunk)]))
        pairs = zip(hidden.split(HEAD_TOKENS), following.split(HEAD_TOKENS), strict=True)
        logprobs += [_logprobs(model.logits(part), targets) for part, targets in pairs]
    return torch.cat(logprobs).tolist()


def _logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """The log-probability of `targets` [N] under `logits` [N, V]."""
    logits = logits.float()
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(dim=-1)


def windows(length: int, context: int) -> Iterator[tuple[int, int, int]]:
    """Windows over `length` tokens: where each starts, where the tokens that it scores start, and where it stops."""
    stop = min(length, context)
    yield 0, 1, stop
    while stop < length:
        first, stop = stop, min(length, stop + max(1, context // 2))
        yield stop - context, first, stop
