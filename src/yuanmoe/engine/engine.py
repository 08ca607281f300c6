"""Requests that come and go over one model: continuous batching with paged state, token ids in, token ids out.

One `step` is one pass of the model: a token for every sequence that is being written, and chunks of the prompts that
are being read. What a request says does not depend on the others (`docs/engine.md`). Not thread-safe: one thread makes
all calls. Not here: text, HTTP, stop strings.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from yuanmoe.engine.pages import Pages
from yuanmoe.engine.requests import (
    FinishReason,
    PromptLogprobs,
    Request,
    RequestOutput,
    Stats,
    TokenRouting,
    max_length,
)
from yuanmoe.engine.runner import PassResult, Runner
from yuanmoe.engine.sampling import Sampler, TopLogprobs, require_numbers, sample, top_logprobs
from yuanmoe.engine.schedule import Schedule, Sequence
from yuanmoe.errors import ContextLengthError, UsageError
from yuanmoe.model.decoder import CausalLM
from yuanmoe.model.lora.multi_lora import MultiLora
from yuanmoe.model.state.paged import PagedCache

CONTEXTS = 4
"""Full contexts that the cache has room for, unless it is told otherwise."""


class Engine:
    """Continues requests together; between two steps they may join and leave."""

    def __init__(
        self,
        model: CausalLM,
        *,
        adapters: MultiLora | None = None,
        vocab_size: int | None = None,
        cache_tokens: int | None = None,
        page_size: int = 32,
        max_batch_size: int = 64,
        step_tokens: int = 512,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        """`adapters` are those of this model that requests may name. `vocab_size` is the tokenizer's, where the model
        has more rows: those are never sampled.

        `cache_tokens` is the room for the state of all sequences, in tokens (None: four full contexts), in pages of
        `page_size`, a multiple of 32 for the compiled kernels; `step_tokens` bounds the tokens of a pass; `kv_dtype` is
        the model's own unless given. Raises UsageError for numbers that do not fit one another.
        """
        context = model.config.max_position_embeddings
        cache_tokens = CONTEXTS * context if cache_tokens is None else cache_tokens
        if min(page_size, max_batch_size) < 1:
            raise UsageError(f"page_size is {page_size} and max_batch_size {max_batch_size}; both must be at least 1")
        if step_tokens < max_batch_size:
            raise UsageError(
                f"step_tokens {step_tokens} is below max_batch_size {max_batch_size}; a pass needs a token for each"
            )
        num_pages = cache_tokens // page_size
        if num_pages < 1:
            raise UsageError(f"cache_tokens {cache_tokens} is not one page of {page_size} (page_size)")
        self._device = model.device
        self._vocab_size = vocab_size or model.config.vocab_size
        self._context = context
        self._page_size = page_size
        cache = PagedCache(
            model.config,
            num_pages,
            page_size,
            dtype=model.activation_dtype,
            kv_dtype=kv_dtype or model.kv_dtype,
            device=model.device,
        )
        self._adapters = adapters or MultiLora(model, {})
        self._runner = Runner(model, self._adapters, cache, self._vocab_size)
        self._schedule = Schedule(Pages(num_pages), page_size, max_batch_size, step_tokens)
        self._sequences: dict[int, Sequence] = {}
        self._submitted = self._steps = self._computed_tokens = self._generated_tokens = 0

    def submit(self, request: Request) -> int:
        """Queues a request and returns its id. Raises UsageError and ContextLengthError before anything is spent,
        also for a request that could never fit the cache."""
        prompt_ids = list(request.prompt_ids)
        adapter = self._adapters.number(request.adapter)
        max_length = self._max_length(request)
        sequence = Sequence(
            request_id=self._submitted,
            request=request,
            sampler=Sampler(request.params, prompt_ids, self._vocab_size, self._device),
            ids=prompt_ids,
            num_prompt=len(prompt_ids),
            max_length=max_length,
            table=np.zeros(-(-max_length // self._page_size), dtype=np.int32),
            adapter=adapter,
            prompt=PromptLogprobs([], []) if request.prompt_logprobs else None,
        )
        self._submitted += 1
        self._sequences[sequence.request_id] = sequence
        self._schedule.waiting.append(sequence)
        return sequence.request_id

    def cancel(self, request_id: int) -> bool:
        """Ends a request and frees all it holds, now; whether there was one. No output of it follows."""
        if request_id not in self._sequences:
            return False
        self._remove(self._sequences[request_id])
        return True

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """One pass of the model: the tokens that it made, at most one a request. Without work, nothing.

        What fails in one request ends that request with an error; what fails in the pass ends those in it.
        """
        if not self.has_work:
            return []
        batch = self._schedule.plan()
        assert batch, "work, and nothing to compute"
        ended = [sequence for sequence, count in batch if count == sequence.missing]
        try:
            done = self._runner.run(batch)
            choices = self._choose(ended, done)
        except BaseException as error:
            # What the pass left in the pages of these sequences is not known.
            failed = [self._fail(sequence, error) for sequence, _ in batch]
            if isinstance(error, Exception):
                return failed
            raise
        self._schedule.advance(batch)
        self._steps += 1
        self._computed_tokens += sum(count for _, count in batch)
        return [self._accept(sequence, choice) for sequence, choice in zip(ended, choices, strict=True)]

    @property
    def has_work(self) -> bool:
        """Whether a request is queued or running."""
        return bool(self._sequences)

    def stats(self) -> Stats:
        """Counters and levels, for metrics."""
        schedule, pages = self._schedule, self._schedule.pages
        return Stats(
            queued=len(schedule.waiting),
            running=len(schedule.running),
            free_pages=pages.num_free,
            used_pages=pages.num_pages - pages.num_free,
            reusable_pages=pages.num_unused,
            steps=self._steps,
            computed_tokens=self._computed_tokens,
            generated_tokens=self._generated_tokens,
            reused_tokens=schedule.reused_tokens,
            preemptions=schedule.preemptions,
            expert_load=self._runner.load.counts(),
        )

    def _choose(self, sequences: list[Sequence], done: PassResult) -> list["_Choice"]:
        """The next token of each sequence, which is not told of it yet."""
        if not sequences:
            return []
        allowed, errors = _ask_constraints(sequences, self._vocab_size)
        sampled = sample(done.logits, [sequence.sampler for sequence in sequences], allowed)
        tops = _top_logprobs(sequences, done.logits)
        return [
            _Choice(token_id, logprob, tops.get(row, ()), routing, errors.get(row))
            for row, (token_id, logprob, routing) in enumerate(zip(*sampled, done.routings, strict=True))
        ]

    def _accept(self, sequence: Sequence, choice: "_Choice") -> RequestOutput:
        try:
            if choice.error is not None:
                raise choice.error
            require_numbers(choice.logprob)
            if sequence.request.constraint is not None:
                sequence.request.constraint.accept(choice.token_id)
        except Exception as error:
            return self._fail(sequence, error)
        self._generated_tokens += 1
        sequence.ids.append(choice.token_id)
        prompt, sequence.prompt = sequence.prompt, None
        output = RequestOutput(
            sequence.request_id,
            choice.token_id,
            choice.logprob,
            choice.top_logprobs,
            _finish_reason(sequence),
            choice.routing,
            prompt,
            min(sequence.reused, sequence.num_prompt),
        )
        if output.finish_reason is not None:
            self._remove(sequence)
        return output

    def _remove(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request_id]
        self._schedule.remove(sequence)

    def _fail(self, sequence: Sequence, error: BaseException) -> RequestOutput:
        self._remove(sequence)
        return RequestOutput(sequence.request_id, -1, math.nan, error=error if isinstance(error, Exception) else None)

    def _max_length(self, request: Request) -> int:
        """Tokens at which a request ends. Raises UsageError and ContextLengthError."""
        num_prompt, max_new_tokens = len(request.prompt_ids), request.params.max_new_tokens
        length = max_length(request.prompt_ids, max_new_tokens, self._vocab_size, self._context)
        # The last token is never stored.
        room = self._schedule.pages.num_pages * self._page_size + 1
        if length > room and (max_new_tokens is not None or num_prompt >= room):
            raise ContextLengthError(
                f"the prompt has {num_prompt} tokens; with {length - num_prompt} new ones it exceeds the {room - 1} "
                "that the cache holds (cache_tokens); shorten it, ask for fewer (max_new_tokens), or make more room"
            )
        return min(length, room)


class _Choice(NamedTuple):
    """The next token of a sequence, or why there is none."""

    token_id: int
    logprob: float
    top_logprobs: TopLogprobs
    routing: TokenRouting | None
    error: Exception | None


def _ask_constraints(sequences: list[Sequence], vocab_size: int) -> tuple[dict[int, Tensor], dict[int, Exception]]:
    """The tokens that grammars allow, by row, and the rows whose grammar failed."""
    allowed: dict[int, Tensor] = {}
    errors: dict[int, Exception] = {}
    for row, sequence in enumerate(sequences):
        constraint = sequence.request.constraint
        if constraint is not None:
            try:
                allowed[row] = _checked_mask(constraint.mask(), vocab_size)
            except Exception as error:
                errors[row] = error
    return allowed, errors


def _checked_mask(mask: Tensor, vocab_size: int) -> Tensor:
    if mask.dtype != torch.bool or mask.shape != (vocab_size,):
        raise UsageError(f"a constraint's mask is {list(mask.shape)} of {mask.dtype}; it must be [{vocab_size}] bool")
    if not mask.any():
        raise UsageError("the constraint allows no token, not even a stop token; the grammar cannot go on from here")
    return mask


def _top_logprobs(sequences: list[Sequence], logits: Tensor) -> dict[int, TopLogprobs]:
    """The likeliest tokens beside each choice, by row, for those who asked."""
    counts = {row: n for row, sequence in enumerate(sequences) if (n := sequence.request.top_logprobs)}
    if not counts:
        return {}
    logprobs = logits[list(counts)].float().log_softmax(dim=-1)
    tops = top_logprobs(logprobs, max(counts.values()))
    return {row: top[:count] for (row, count), top in zip(counts.items(), tops, strict=True)}


def _finish_reason(sequence: Sequence) -> FinishReason | None:
    """Whether the last token ends the sequence."""
    if sequence.ids[-1] in sequence.request.params.stop_ids:
        return "stop"
    return "length" if len(sequence.ids) == sequence.max_length else None
