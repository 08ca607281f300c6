"""A batch of prompts continued together: token ids in, one event a token out.

Prompts are read in passes of a bounded number of tokens, only the last hidden state of each meets the output head, and
a sequence that is finished leaves the batch. Sequences of any lengths share the passes without padding, so each is
computed as if it were alone. Not here: text (`yuanmoe.lm`), sequences that join a running batch.
Legend: B sequences, D hidden, V vocabulary, L layers with experts, K chosen.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from yuanmoe.engine.requests import FinishReason, TokenRouting
from yuanmoe.engine.sampling import Sampler, SamplingParams, require_numbers, sample
from yuanmoe.errors import ContextLengthError, UsageError
from yuanmoe.model.cache import Cache
from yuanmoe.model.decoder import YuanForCausalLM
from yuanmoe.model.router import Routing
from yuanmoe.plan.planner import PREFILL_TOKENS


class Token(NamedTuple):
    """One generated token of one sequence; `finish_reason` is set on the sequence's last."""

    sequence: int
    """Index of its prompt."""
    token_id: int
    logprob: float
    """Under the model itself, before penalties, temperature and filters."""
    finish_reason: FinishReason | None
    routing: TokenRouting | None = None
    """Of this token as it passed the layers; None where it was not asked for, and for a sequence's last token, which
    no pass reads."""


@dataclass(slots=True)
class Timing:
    """Seconds spent in the model and in sampling, and the tokens that took them; of all sequences together."""

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    """From the start to the first token of every sequence."""
    decode_tokens: int = 0
    """Without the first of every sequence."""
    decode_s: float = 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prefill_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        return self.decode_tokens / self.decode_s if self.decode_s else 0.0


@dataclass(slots=True, kw_only=True)
class _Sequence:
    index: int
    prompt_ids: Sequence[int]
    max_new_tokens: int
    sampler: Sampler
    num_generated: int = 0
    last_id: int = -1
    finished: bool = False
    """By its own last token."""
    stopped: bool = False
    """From outside."""

    def accept(self, token_id: int, logprob: float) -> Token:
        self.num_generated += 1
        self.last_id = token_id
        reason: FinishReason | None = None
        if token_id in self.sampler.params.stop_ids:
            reason = "stop"
        elif self.num_generated == self.max_new_tokens:
            reason = "length"
        self.finished = reason is not None
        return Token(self.index, token_id, logprob, reason)


class Generation:
    """The continuation of a batch of prompts: an iterator over its tokens, as they are made.

    All sequences take a step together, so their tokens alternate. With `routing` a token arrives after the pass that
    reads it, one step later.
    """

    def __init__(
        self,
        model: YuanForCausalLM,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chunk_size: int = PREFILL_TOKENS,
        vocab_size: int | None = None,
        routing: bool = False,
    ) -> None:
        """`params` for all prompts or for each; `chunk_size` bounds the prompt tokens of one pass.

        `vocab_size` is the tokenizer's, where the model has more rows: those are never sampled. Raises UsageError and
        ContextLengthError here, before anything is computed.
        """
        if chunk_size < 1:
            raise UsageError(f"chunk_size is {chunk_size}; it must be at least 1 token a pass")
        if not isinstance(params, Sequence):
            params = [params or SamplingParams()] * len(prompts)
        if not prompts or len(params) != len(prompts):
            raise UsageError(f"{len(prompts)} prompts and {len(params)} sets of sampling parameters; give one for each")
        self._model = model
        # Activations have the dtype of the norms, whatever the precision of the matrices.
        self._norm = model.model.norm.weight
        self._vocab_size = vocab_size or model.config.vocab_size
        self._chunk_size = chunk_size
        self._routing = routing
        numbered = enumerate(zip(prompts, params, strict=True))
        self._sequences = [self._sequence(index, prompt, settings) for index, (prompt, settings) in numbered]
        self._live = list(self._sequences)
        self._tokens = self._run()
        self.timing = Timing()
        """Of what was computed so far."""

    def __iter__(self) -> Iterator[Token]:
        return self._tokens

    def __next__(self) -> Token:
        return next(self._tokens)

    def stop(self, sequence: int) -> None:
        """End a sequence from outside: no token of it follows, and it leaves the batch before the next pass."""
        self._sequences[sequence].stopped = True

    def _sequence(self, index: int, prompt_ids: Sequence[int], params: SamplingParams) -> _Sequence:
        if not prompt_ids:
            raise UsageError(f"prompt {index} is empty; the model needs a token to start from, such as <eod>")
        wrong = next((token_id for token_id in prompt_ids if not 0 <= token_id < self._vocab_size), None)
        if wrong is not None:
            raise UsageError(f"prompt {index} holds the token id {wrong}; ids are 0..{self._vocab_size - 1}")
        context = self._model.config.max_position_embeddings
        room = context - len(prompt_ids)
        new_tokens = max(room, 1) if params.max_new_tokens is None else params.max_new_tokens
        if new_tokens > room:
            excess = new_tokens - room
            ways = [f"shorten it by {excess} tokens"] if excess < len(prompt_ids) else []
            ways += [f"ask for at most {room} new ones (max_new_tokens)"] if room > 0 else []
            raise ContextLengthError(
                f"prompt {index} has {len(prompt_ids)} tokens; with {new_tokens} new ones it exceeds the model's "
                f"context of {context} (max_position_embeddings); {', or '.join(ways)}"
            )
        sampler = Sampler(params, prompt_ids, self._vocab_size, self._norm.device)
        return _Sequence(index=index, prompt_ids=prompt_ids, max_new_tokens=new_tokens, sampler=sampler)

    def _run(self) -> Iterator[Token]:
        cache, tokens = self._begin()
        while tokens:
            if not self._routing:
                yield from self._unstopped(tokens)
            routings, following = self._advance(cache)
            if self._routing:
                yield from self._unstopped([token._replace(routing=routings.get(token.sequence)) for token in tokens])
            tokens = following

    def _unstopped(self, tokens: list[Token]) -> Iterator[Token]:
        return (token for token in tokens if not self._sequences[token.sequence].stopped)

    @torch.inference_mode()
    def _begin(self) -> tuple[Cache, list[Token]]:
        """Reads the prompts; the first token of every sequence."""
        start = time.perf_counter()
        lengths = [len(sequence.prompt_ids) for sequence in self._live]
        capacity = max(length + sequence.max_new_tokens for length, sequence in zip(lengths, self._live, strict=True))
        cache = self._model.new_cache(len(lengths), capacity)
        last = self._norm.new_empty(len(lengths), len(self._norm))
        for counts in chunks(lengths, self._chunk_size):
            parts = zip(self._live, cache.lengths, counts, strict=True)
            ids = [token_id for part, done, count in parts for token_id in part.prompt_ids[done : done + count]]
            sequences = cache.extend(counts)
            hidden, _ = self._model.model(torch.tensor(ids, device=self._norm.device), sequences)
            rows = [row for row, count in enumerate(counts) if count]
            last[rows] = hidden[sequences.last[rows]]
        tokens = self._choose(last)
        self.timing = Timing(prefill_tokens=sum(lengths), prefill_s=time.perf_counter() - start)
        return cache, tokens

    @torch.inference_mode()
    def _advance(self, cache: Cache) -> tuple[dict[int, TokenRouting], list[Token]]:
        """Reads the last token of each unfinished sequence: how it was routed, by sequence, and the tokens after it."""
        start = time.perf_counter()
        rows = [row for row, live in enumerate(self._live) if not (live.finished or live.stopped)]
        if not rows:
            return {}, []
        if len(rows) < len(self._live):
            self._live = [self._live[row] for row in rows]
            cache.select(rows)
        ids = torch.tensor([sequence.last_id for sequence in self._live], device=self._norm.device)
        hidden, routings = self._model.model(ids, cache.extend([1] * len(rows)))
        tokens = self._choose(hidden)
        self.timing.decode_tokens += len(tokens)
        self.timing.decode_s += time.perf_counter() - start
        if not (self._routing and routings):
            return {}, tokens
        return dict(zip((token.sequence for token in tokens), token_routings(routings), strict=True)), tokens

    def _choose(self, hidden: Tensor) -> list[Token]:
        """The next token of each live sequence, from the last hidden states [B, D]."""
        logits = self._model.logits(hidden)[:, : self._vocab_size]
        sampled = sample(logits, [sequence.sampler for sequence in self._live])
        for logprob in sampled.logprobs:
            require_numbers(logprob)
        chosen = zip(self._live, sampled.ids, sampled.logprobs, strict=True)
        return [sequence.accept(token_id, logprob) for sequence, token_id, logprob in chosen]


def chunks(lengths: Sequence[int], chunk_size: int) -> Iterator[list[int]]:
    """How many tokens of each prompt to read in each pass: at most `chunk_size` together, the first prompts first."""
    left = list(lengths)
    while any(left):
        room = chunk_size
        counts = []
        for remaining in left:
            counts.append(min(remaining, room))
            room -= counts[-1]
        left = [remaining - count for remaining, count in zip(left, counts, strict=True)]
        yield counts


def token_routings(routings: Sequence[Routing]) -> list[TokenRouting]:
    """The routings of the layers, turned to one a token."""
    experts = torch.stack([routing.experts for routing in routings], dim=1).cpu()
    weights = torch.stack([routing.weights for routing in routings], dim=1).cpu()
    return [TokenRouting(*both) for both in zip(experts, weights, strict=True)]
