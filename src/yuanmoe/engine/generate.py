"""A batch of prompts continued together: token ids in, one event a token out.

A thin user of the engine: all requests are there from the start, and each sequence has one page as long as it can get.
Not here: text (`yuanmoe.lm`), sequences that join a running batch (`engine.py`).
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from yuanmoe.engine.engine import Engine
from yuanmoe.engine.requests import FinishReason, Request, RequestOutput, TokenRouting, max_length
from yuanmoe.engine.sampling import SamplingParams
from yuanmoe.errors import UsageError
from yuanmoe.model.decoder import CausalLM
from yuanmoe.plan.device.planner import PREFILL_TOKENS


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
class GenerationTiming:
    """Seconds spent in the model and in sampling, and the tokens that took them; of all sequences together."""

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    """In passes that read prompts: from the start to the first token of every sequence."""
    decode_tokens: int = 0
    """Of the passes after those."""
    decode_s: float = 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prefill_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        return self.decode_tokens / self.decode_s if self.decode_s else 0.0


class Generation:
    """The continuation of a batch of prompts: an iterator over its tokens, as they are made.

    All sequences take a step together, so their tokens alternate. With `routing` a token arrives after the pass that
    reads it, one step later.
    """

    def __init__(
        self,
        model: CausalLM,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chunk_size: int = PREFILL_TOKENS,
        vocab_size: int | None = None,
        routing: bool = False,
    ) -> None:
        """`params` for all prompts or for each; `chunk_size` bounds the tokens of one pass, but for one a prompt.

        `vocab_size` is the tokenizer's, where the model has more rows: those are never sampled. Raises UsageError and
        ContextLengthError here, before anything is computed.
        """
        if chunk_size < 1:
            raise UsageError(f"chunk_size is {chunk_size}; it must be at least 1 token a pass")
        if not isinstance(params, Sequence):
            params = [params or SamplingParams()] * len(prompts)
        if not prompts or len(params) != len(prompts):
            raise UsageError(f"{len(prompts)} prompts and {len(params)} sets of sampling parameters; give one for each")
        vocab_size = vocab_size or model.config.vocab_size
        context = model.config.max_position_embeddings
        longest = max(
            max_length(prompt, each.max_new_tokens, vocab_size, context, _name(index, len(prompts)))
            for index, (prompt, each) in enumerate(zip(prompts, params, strict=True))
        )
        self._engine = Engine(
            model,
            vocab_size=vocab_size,
            cache_tokens=len(prompts) * longest,
            page_size=longest,
            max_batch_size=len(prompts),
            step_tokens=max(chunk_size, len(prompts)),
        )
        requests = [
            Request(prompt_ids=prompt, params=each, routing=routing)
            for prompt, each in zip(prompts, params, strict=True)
        ]
        # Ids of a new engine's requests count from 0, like the prompts.
        self._unread = {self._engine.submit(request) for request in requests}
        self._stopped: set[int] = set()
        self._prompt_tokens = sum(map(len, prompts))
        self._tokens = self._delayed() if routing else self._run()
        self.timing = GenerationTiming()
        """Of what was computed so far."""

    def __iter__(self) -> Iterator[Token]:
        return self._tokens

    def __next__(self) -> Token:
        return next(self._tokens)

    def stop(self, sequence: int) -> None:
        """End a sequence from outside: no token of it follows, and it leaves the batch before the next pass."""
        self._stopped.add(sequence)
        self._unread.discard(sequence)
        self._engine.cancel(sequence)

    def _run(self) -> Iterator[Token]:
        for output in self._outputs():
            yield _token(output)

    def _delayed(self) -> Iterator[Token]:
        """Tokens with their routing, which comes with the output after theirs."""
        held: dict[int, Token] = {}
        for output in self._outputs():
            sequence = output.request_id
            if sequence in held:
                yield held.pop(sequence)._replace(routing=output.routing)
            if sequence not in self._stopped:
                held[sequence] = _token(output)
                if output.finish_reason is not None:
                    yield held.pop(sequence)

    def _outputs(self) -> Iterator[RequestOutput]:
        while self._engine.has_work:
            for output in self._step():
                if output.error is not None:
                    raise output.error
                if output.request_id not in self._stopped:
                    yield output

    def _step(self) -> list[RequestOutput]:
        start = time.perf_counter()
        outputs = self._engine.step()
        seconds = time.perf_counter() - start
        timing = self.timing
        if self._unread:
            timing.prefill_s += seconds
            self._unread -= {output.request_id for output in outputs}
            timing.prefill_tokens = self._prompt_tokens
        else:
            timing.decode_tokens += len(outputs)
            timing.decode_s += seconds
        return outputs


def _name(index: int, count: int) -> str:
    return f"prompt {index}" if count > 1 else "the prompt"


def _token(output: RequestOutput) -> Token:
    return Token(output.request_id, output.token_id, output.logprob, output.finish_reason)
