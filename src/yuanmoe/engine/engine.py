"""Requests that come and go over one model: continuous batching with paged state, token ids in, token ids out.

One `step` is one pass of the model: a token for every sequence that is being written, and chunks of the prompts that
are being read. What a request says does not depend on the others (`docs/engine.md`). Not thread-safe: one thread makes
all calls. Not here: text, HTTP, stop strings.
"""

import torch

from yuanmoe.engine.requests import Output, Request, Stats
from yuanmoe.model.decoder import YuanForCausalLM


class Engine:
    """Continues requests together; between two steps they may join and leave."""

    def __init__(
        self,
        model: YuanForCausalLM,
        *,
        vocab_size: int | None = None,
        cache_tokens: int | None = None,
        page_size: int = 32,
        max_batch_size: int = 64,
        step_tokens: int = 512,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        """`vocab_size` is the tokenizer's, where the model has more rows: those are never sampled.

        `cache_tokens` is the room for the state of all sequences, in tokens (None: four full contexts), in pages of
        `page_size`; `step_tokens` bounds the tokens of a pass; `kv_dtype` is the model's own unless given. Raises
        UsageError for numbers that do not fit one another.
        """

    def submit(self, request: Request) -> int:
        """Queues a request and returns its id. Raises UsageError and ContextLengthError before anything is spent,
        also for a request that could never fit the cache."""
        raise NotImplementedError

    def cancel(self, request_id: int) -> bool:
        """Ends a request and frees all it holds, now; whether there was one. No output of it follows."""
        raise NotImplementedError

    def step(self) -> list[Output]:
        """One pass of the model: the tokens that it made, at most one a request. Without work, nothing.

        What fails in one request ends that request with an error; what fails in the pass ends those in it.
        """
        raise NotImplementedError

    @property
    def has_work(self) -> bool:
        """Whether a request is queued or running."""
        raise NotImplementedError

    def stats(self) -> Stats:
        """Counters and levels, for metrics."""
        raise NotImplementedError
