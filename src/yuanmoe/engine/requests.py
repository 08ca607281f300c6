"""What goes into the engine and what comes out: a request, and one output for each of its tokens.

Token ids only; text, stop strings and formats are the caller's. Legend: L layers with experts, K chosen, E experts,
V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from yuanmoe.engine.sampling import SamplingParams, TopLogprobs
from yuanmoe.errors import ContextLengthError, UsageError

FinishReason = Literal["stop", "length"]
MAX_TOP_LOGPROBS = 20
"""The OpenAI API's limit too."""


class TokenRouting(NamedTuple):
    """Where one token went, on the CPU: its `experts` [L, K], best first, and their `weights` [L, K]."""

    experts: Tensor
    weights: Tensor


class Constraint(Protocol):
    """What a grammar allows. The engine only asks; an exception of either method ends this request with an error."""

    def mask(self) -> Tensor:
        """The tokens that may come next, [V] bool on the CPU, at least one of them."""
        ...

    def accept(self, token_id: int) -> None:
        """A token was chosen, the stop token included."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """A prompt to continue. Raises UsageError for numbers that mean nothing."""

    prompt_ids: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    routing: bool = False
    """Whether outputs say which experts were visited."""
    top_logprobs: int = 0
    """How many of the likeliest tokens to name beside each token, up to 20."""
    prompt_logprobs: bool = False
    """Whether the first output scores the prompt; all of it is computed then, nothing reused."""
    constraint: Constraint | None = None
    """A grammar's state, of this request alone."""
    adapter: str | None = None
    """The name of one of the engine's adapters, which corrects the model for this request."""

    def __post_init__(self) -> None:
        if not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise UsageError(f"top_logprobs is {self.top_logprobs}; it must be between 0 and {MAX_TOP_LOGPROBS}")


class PromptLogprobs(NamedTuple):
    """Of each prompt token but the first: its log-probability given those before it, and the likeliest in its place."""

    logprobs: list[float]
    top: list[TopLogprobs]
    """Empty unless top_logprobs were asked for."""


class RequestOutput(NamedTuple):
    """One token of one request, or the error that ended it.

    The last output of a request has a `finish_reason` or an `error`; a cancelled request has no further output.
    """

    request_id: int
    token_id: int
    """-1 with an error."""
    logprob: float
    """Under the model itself: before bias, penalties, temperature, filters and grammar."""
    top_logprobs: TopLogprobs = ()
    finish_reason: FinishReason | None = None
    routing: TokenRouting | None = None
    """Of the token before this one, which the pass read: the prompt's last for the first output. So a token's own
    routing comes with the next output, and the last token, which no pass reads, has none."""
    prompt: PromptLogprobs | None = None
    """On the first output, where it was asked for."""
    reused_tokens: int = 0
    """Tokens of the prompt that were found computed, when the request last started."""
    error: Exception | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """The engine now, and what it counted since it was made."""

    queued: int
    running: int
    free_pages: int
    """Nobody's, among them those that keep a finished prefix until the room is needed."""
    used_pages: int
    reusable_pages: int
    """Of the free ones, those with a prefix."""
    steps: int
    """Passes of the model."""
    computed_tokens: int
    """Through the model, prompts and recomputed tokens included."""
    generated_tokens: int
    reused_tokens: int
    """Prompt tokens that were found computed."""
    preemptions: int
    expert_load: Tensor
    """Visits of each expert, [L, E] int64 on the CPU; E is that of the largest layer."""


def max_length(
    prompt_ids: Sequence[int], max_new_tokens: int | None, vocab_size: int, context: int, prompt: str = "the prompt"
) -> int:
    """Tokens at which the continuation of a prompt ends at the latest. Raises UsageError and ContextLengthError."""
    if not prompt_ids:
        raise UsageError(f"{prompt} is empty; the model needs a token to start from, such as <eod>")
    wrong = next((token_id for token_id in prompt_ids if not 0 <= token_id < vocab_size), None)
    if wrong is not None:
        raise UsageError(f"{prompt} holds the token id {wrong}; ids are 0..{vocab_size - 1}")
    room = context - len(prompt_ids)
    new_tokens = max(room, 1) if max_new_tokens is None else max_new_tokens
    if new_tokens > room:
        excess = new_tokens - room
        ways = [f"shorten it by {excess} tokens"] if excess < len(prompt_ids) else []
        ways += [f"ask for at most {room} new ones (max_new_tokens)"] if room > 0 else []
        raise ContextLengthError(
            f"{prompt} has {len(prompt_ids)} tokens; with {new_tokens} new ones it exceeds the model's "
            f"context of {context} (max_position_embeddings); {', or '.join(ways)}"
        )
    return len(prompt_ids) + new_tokens
