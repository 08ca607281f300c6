"""From logits to the next token of each sequence: penalties, bias, grammar, temperature, filters, and a random stream.

Filters look at values only: tokens that tie with the last one kept are kept too, so nothing depends on how a device
sorts. A draw takes one number of the sequence's own stream and inverts the cumulative distribution in vocabulary
order, so that neither batch neighbours nor the device decide what a seed says.
Sources: top-p arXiv 1904.09751, min-p arXiv 2407.01082, repetition penalty arXiv 1909.05858; presence and frequency
penalties as in the OpenAI API. Legend: B sequences, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from yuanmoe.errors import CheckpointError, UsageError

LIKELY_TOKENS = 1024
"""Top-p looks at so many tokens first: sorting a vocabulary of 135,040 takes some 10 ms on a CPU, finding these 1."""
MAX_BIAS = 100
"""The OpenAI API's limit too: enough to forbid a token, or to allow no other."""
TopLogprobs = tuple[tuple[int, float], ...]
"""Token ids with their log-probabilities, the likeliest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one sequence continues. Raises UsageError for numbers that mean nothing.

    Applied in this order: penalties, bias, temperature, top-k, top-p and min-p, each filter on what the previous one
    left.
    """

    temperature: float = 0.0
    """0 always takes the likeliest token, the lowest id among equals; the filters then change nothing."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 is no limit."""
    top_p: float = 1.0
    """Only the likeliest tokens whose probabilities together reach this; 1 is no limit."""
    min_p: float = 0.0
    """Only tokens at least this share as likely as the likeliest; 0 is no limit."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of every token in prompt and answer; 1 is none."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the answer holds."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time the answer holds it."""
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    """Added to the logits of these tokens, -100 to 100."""
    seed: int | None = None
    """Of the random stream; None takes a new one each time."""
    max_new_tokens: int | None = None
    """None is until a stop token or the end of the context."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the sequence; the one that did is its last token."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        _require("temperature", self.temperature, 0 <= self.temperature <= 100, "between 0 (greedy) and 100")
        _require("top_k", self.top_k, self.top_k >= 0, "0 (no limit) or above")
        _require("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1 (no limit)")
        _require("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 (no limit) and 1")
        penalty = self.repetition_penalty
        _require("repetition_penalty", penalty, 0 < penalty < math.inf, "above 0 (1 is none)")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(name, value, -2 <= value <= 2, "between -2 and 2 (0 is none)")
        if self.seed is not None:
            _require("seed", self.seed, 0 <= self.seed < 2**63, "between 0 and 2^63 - 1")
        if self.max_new_tokens is not None:
            _require("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1")
        for stop_id in self.stop_ids:
            _require("a stop id", stop_id, stop_id >= 0, "a token id, so at least 0")
        for token_id, bias in self.logit_bias.items():
            wanted = f"between -{MAX_BIAS} and {MAX_BIAS}"
            _require(f"the logit_bias of token {token_id}", bias, -MAX_BIAS <= bias <= MAX_BIAS, wanted)

    @property
    def penalizes(self) -> bool:
        """Whether it matters what was said before."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _require(name: str, value: object, holds: bool, wanted: str) -> None:
    if not holds:
        raise UsageError(f"{name} is {value}; it must be {wanted}")


class Sampler:
    """What choosing the tokens of one sequence remembers: its parameters, its random stream, and what was said."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        vocab_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """Raises UsageError for a bias on a token outside the vocabulary."""
        wrong = next((token_id for token_id in params.logit_bias if not 0 <= token_id < vocab_size), None)
        if wrong is not None:
            raise UsageError(f"logit_bias names the token id {wrong}; ids are 0..{vocab_size - 1}")
        self.params = params
        # On the CPU whatever the model's device, so that a seed means the same everywhere.
        self._random = torch.Generator()
        if params.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(params.seed)
        self._counts: Tensor | None = None
        if params.penalizes:
            self._counts = torch.zeros(vocab_size, device=device)
            self._in_prompt = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._in_prompt[list(prompt_ids)] = True
        self._bias: tuple[Tensor, Tensor] | None = None
        if params.logit_bias:
            ids, values = zip(*params.logit_bias.items(), strict=True)
            self._bias = torch.tensor(ids, device=device), torch.tensor(values, dtype=torch.float32, device=device)

    @property
    def adjusts(self) -> bool:
        """Whether the logits are not taken as they are."""
        return self._counts is not None or self._bias is not None

    def adjust(self, logits: Float[Tensor, " V"]) -> Float[Tensor, " V"]:
        """The logits after penalties and bias."""
        if self._counts is not None:
            logits = self._penalized(logits, self._counts)
        return logits if self._bias is None else logits.index_add(0, *self._bias)

    def _penalized(self, logits: Float[Tensor, " V"], counts: Float[Tensor, " V"]) -> Float[Tensor, " V"]:
        params, said = self.params, counts > 0
        divided = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
        logits = torch.where(said | self._in_prompt, divided, logits)
        return logits - params.presence_penalty * said - params.frequency_penalty * counts

    def draw(self) -> float:
        """The next number of the stream, in [0, 1)."""
        # Kept 2^-32 below 1, so that its product with a sum stays below the sum in float64.
        return min(torch.rand((), dtype=torch.float64, generator=self._random).item(), 1 - 2**-32)

    def record(self, token_id: int) -> None:
        """Count a token as said."""
        if self._counts is not None:
            self._counts[token_id] += 1


class Sampled(NamedTuple):
    """The next token of each sequence, and its log-probability under the model itself (before all of the above).

    NaN where the logits of a sequence are no numbers; its token then means nothing.
    """

    ids: list[int]
    logprobs: list[float]


def sample(
    logits: Float[Tensor, "B V"], samplers: Sequence[Sampler], allowed: Mapping[int, Bool[Tensor, " V"]] | None = None
) -> Sampled:
    """Chooses and records one token for each sequence; `allowed` are the tokens that some rows may take."""
    logits = logits.float()
    scores = _adjusted(logits, samplers, allowed or {})
    chosen = scores.argmax(dim=-1)
    drawn = [row for row, sampler in enumerate(samplers) if sampler.params.temperature > 0]
    if drawn:
        chosen[drawn] = _draw(scores[drawn], [samplers[row] for row in drawn])
    logprobs = logits.log_softmax(dim=-1).gather(1, chosen[:, None])[:, 0].tolist()
    ids = chosen.tolist()
    for sampler, token_id in zip(samplers, ids, strict=True):
        sampler.record(token_id)
    return Sampled(ids, logprobs)


def require_numbers(logprob: float) -> None:
    """Raises CheckpointError for the log-probability of a sequence whose logits are no numbers."""
    if math.isnan(logprob):
        raise CheckpointError(
            "a sequence got scores that are not numbers: the weights are damaged (`yuanmoe verify` tells) or overflow "
            "in their dtype (load them as bfloat16 or float32)"
        )


def _adjusted(
    logits: Float[Tensor, "B V"], samplers: Sequence[Sampler], allowed: Mapping[int, Bool[Tensor, " V"]]
) -> Float[Tensor, "B V"]:
    adjusting = [row for row, sampler in enumerate(samplers) if sampler.adjusts]
    if not adjusting and not allowed:
        return logits
    scores = logits.clone()
    for row in adjusting:
        scores[row] = samplers[row].adjust(logits[row])
    for row, mask in allowed.items():
        scores[row].masked_fill_(~mask.to(scores.device), -math.inf)
    return scores


def top_logprobs(logprobs: Float[Tensor, "B V"], count: int) -> list[TopLogprobs]:
    """The `count` likeliest tokens of each row (all, if V is smaller), the lowest id first among equals."""
    values, ids = logprobs.topk(min(count, logprobs.shape[-1]), dim=-1)
    rows = zip(ids.tolist(), values.tolist(), strict=True)
    return [tuple(sorted(zip(*row, strict=True), key=lambda pair: (-pair[1], pair[0]))) for row in rows]


def _draw(scores: Float[Tensor, "B V"], samplers: Sequence[Sampler]) -> Int[Tensor, " B"]:
    params = [sampler.params for sampler in samplers]
    # Relative to the largest, and never by 0: a temperature that float32 cannot hold must not make NaN.
    temperature = _column([p.temperature for p in params], scores).clamp(min=torch.finfo(scores.dtype).tiny)
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / temperature
    scores = keep_top_k(scores, [p.top_k for p in params])
    scores = keep_top_p(scores, [p.top_p for p in params])
    scores = keep_min_p(scores, [p.min_p for p in params])
    cumulative = scores.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    draws = _column([sampler.draw() for sampler in samplers], cumulative) * cumulative[:, -1:]
    # The first token whose cumulative probability exceeds the draw; one of probability 0 never does. NaN finds none.
    return torch.searchsorted(cumulative, draws, right=True)[:, 0].clamp(max=scores.shape[-1] - 1)


def keep_top_k(scores: Float[Tensor, "B V"], top_k: Sequence[int]) -> Float[Tensor, "B V"]:
    """Scores with all but the k largest of each row at -inf; 0 keeps the row."""
    V = scores.shape[-1]
    limited = [0 < k < V for k in top_k]
    if not any(limited):
        return scores
    places = [k - 1 if limits else 0 for k, limits in zip(top_k, limited, strict=True)]
    largest = scores.topk(max(places) + 1, dim=-1).values
    smallest_kept = largest.gather(1, torch.tensor(places, device=scores.device)[:, None])
    unlimited = ~torch.tensor(limited, device=scores.device)[:, None]
    return scores.masked_fill(scores < smallest_kept.masked_fill(unlimited, -math.inf), -math.inf)


def keep_top_p(scores: Float[Tensor, "B V"], top_p: Sequence[float]) -> Float[Tensor, "B V"]:
    """Scores with each row's likeliest tokens whose probabilities first reach p kept, the rest at -inf; 1 keeps all."""
    if min(top_p) >= 1:
        return scores
    probabilities = scores.softmax(dim=-1)
    likeliest = probabilities.topk(min(LIKELY_TOKENS, scores.shape[-1]), dim=-1).values
    mass = likeliest.cumsum(dim=-1, dtype=torch.float64)
    limits = _column(top_p, mass)
    if bool(((mass[:, -1:] < limits) & (limits < 1)).any()):
        likeliest = probabilities.sort(dim=-1, descending=True).values
        mass = likeliest.cumsum(dim=-1, dtype=torch.float64)
    last = (mass < limits).sum(dim=-1, keepdim=True).clamp(max=mass.shape[-1] - 1)
    smallest_kept = likeliest.gather(1, last).masked_fill(limits >= 1, 0)
    return scores.masked_fill(probabilities < smallest_kept, -math.inf)


def keep_min_p(scores: Float[Tensor, "B V"], min_p: Sequence[float]) -> Float[Tensor, "B V"]:
    """Scores of tokens less than `min_p` times as likely as the likeliest of their row at -inf; 0 keeps all."""
    if max(min_p) <= 0:
        return scores
    smallest_kept = scores.amax(dim=-1, keepdim=True) + _column(min_p, scores).log()
    return scores.masked_fill(scores < smallest_kept, -math.inf)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
