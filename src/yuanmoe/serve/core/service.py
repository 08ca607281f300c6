"""What both kinds of completion share: from prompts and settings to the engine, and from its outputs to answers."""

import asyncio
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from yuanmoe.checkpoint.card import UsageCard
from yuanmoe.config import ModelConfig
from yuanmoe.engine.requests import Constraint, Request, RequestOutput
from yuanmoe.engine.sampling import SamplingParams
from yuanmoe.errors import ContextLengthError, UsageError
from yuanmoe.http.answers import dumps
from yuanmoe.http.errors import ApiError
from yuanmoe.serve.core.adapters import Offered
from yuanmoe.serve.core.answer import Answer, Delta
from yuanmoe.serve.core.job import Job
from yuanmoe.serve.core.worker import EngineWorker
from yuanmoe.serve.openai.schema import GenerationFields
from yuanmoe.serve.openai.structured import Grammar, GrammarConstraint, Grammars, lark_grammar, regex_grammar
from yuanmoe.text.tokenizer import Tokenizer

LONG_TEXT = 4096
"""Characters beyond which work on a text leaves the event loop, where every stream would wait for it."""

MAX_GRAMMAR_BYTES = 2**17
"""Of a grammar with all its schemas, which bounds what preparing it takes."""
GRAMMAR_S = 10.0
"""How long who asks waits for a grammar."""

T = TypeVar("T")
Update = tuple[int, Delta]
"""What came to one choice."""


@dataclass(slots=True, kw_only=True)
class Service:
    """A model that is being served."""

    config: ModelConfig
    tokenizer: Tokenizer
    worker: EngineWorker
    model_id: str
    fingerprint: str
    """Changes with what may change answers."""
    adapters: Mapping[str, Offered]
    """What requests may name in the place of the model."""
    max_prompt_tokens: int
    cache_tokens: int
    """Room for keys and values of all sequences."""
    timeout_s: float
    """Of a whole answer."""
    card: UsageCard = field(default_factory=UsageCard)
    """What the checkpoint's makers say of its use."""
    strict_max_tokens: bool = False
    """Whether a request for more tokens than fit is refused; else it gets what fits."""
    created: int = field(default_factory=lambda: int(time.time()))
    _grammars: Grammars | None = None
    _compilers: Executor = field(default_factory=lambda: ThreadPoolExecutor(2, "grammar"))
    """Threads of their own: hostile grammars wait for each other, and nobody's text waits for them."""
    _grammars_lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def names(self) -> tuple[str, ...]:
        """The model's name, and those of its adapters."""
        return self.model_id, *self.adapters

    def check_model(self, name: str | None) -> None:
        """Raises ApiError, 404, for the name of another model."""
        if name is not None and name not in self.names:
            raise ApiError(
                404,
                f"the model {name!r} is not here; this server has {', '.join(map(repr, self.names))}",
                code="model_not_found",
                param="model",
            )

    def identity(self, name: str | None) -> dict[str, str]:
        """How answers say who they are from, for a request to the model of that name."""
        adapter = None if name is None else self.adapters.get(name)
        fingerprint = self.fingerprint if adapter is None else adapter.fingerprint
        return {"model": name or self.model_id, "system_fingerprint": fingerprint}

    def check_prompt(self, ids: Sequence[int]) -> None:
        """Raises ContextLengthError for too many tokens; what ids there are is the engine's check."""
        if len(ids) > self.max_prompt_tokens:
            raise ContextLengthError(
                f"the prompt has {len(ids):,} tokens, this server reads at most {self.max_prompt_tokens:,}; "
                f"shorten it by {len(ids) - self.max_prompt_tokens:,} tokens"
            )

    def check_text(self, characters: int) -> None:
        """Raises ContextLengthError for a text that cannot fit, before any of it is read."""
        most = self.max_prompt_tokens * self.tokenizer.longest_token
        if characters > most:
            raise ContextLengthError(
                f"the prompt has {characters:,} characters, this server reads at most {self.max_prompt_tokens:,} "
                f"tokens, which hold at most {most:,} characters; shorten it"
            )

    def fitting(self, ids: Sequence[int], max_new_tokens: int | None) -> int | None:
        """As many new tokens as were asked for, or as fit behind the prompt; where none fits, the engine refuses."""
        room = min(self.config.max_position_embeddings, self.cache_tokens) - len(ids)
        if max_new_tokens is None or self.strict_max_tokens or room < 1:
            return max_new_tokens
        return min(max_new_tokens, room)

    def warnings(self, prompts: Sequence[Sequence[int]], max_new_tokens: int | None) -> dict[str, list[str]]:
        """What an answer says of a limit that was larger than the room; nothing where it fits."""
        given = [self.fitting(ids, max_new_tokens) for ids in prompts]
        cut = [fits for fits in given if fits is not None and fits != max_new_tokens]
        if not cut or max_new_tokens is None:
            return {}
        text = (
            f"max_tokens is {max_new_tokens:,}; behind the prompt {min(cut):,} fit, where the answer ends at the latest"
        )
        return {"warnings": [text]}

    async def begin(
        self,
        prompts: Sequence[Sequence[int]],
        body: GenerationFields,
        *,
        max_new_tokens: int | None,
        top_logprobs: int = 0,
        prompt_logprobs: bool = False,
        grammar: Grammar | None = None,
    ) -> Job:
        """Hands `body.n` requests for each prompt to the engine, in this order. Raises as the engine does."""
        total = len(prompts) * body.n
        self.worker.check(total)
        repeated = [prompt for prompt in prompts for _ in range(body.n)]
        params = [self._params(body, self.fitting(ids, max_new_tokens), place) for place, ids in enumerate(repeated)]
        constraints = await self._constraints(grammar or _guided(body), total)
        return await self.worker.submit(
            [
                Request(
                    prompt_ids=prompt,
                    params=settings,
                    routing=body.routing,
                    top_logprobs=top_logprobs,
                    prompt_logprobs=prompt_logprobs,
                    constraint=constraint,
                    adapter=body.model if body.model in self.adapters else None,
                )
                for prompt, settings, constraint in zip(repeated, params, constraints, strict=True)
            ]
        )

    def _params(self, body: GenerationFields, max_new_tokens: int | None, place: int) -> SamplingParams:
        given: dict[str, Any] = {"temperature": 1.0} | {
            name: value
            for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", *PENALTIES)
            if (value := getattr(body, name)) is not None
        }
        return SamplingParams(
            **given,
            logit_bias={_token_id(name): bias for name, bias in (body.logit_bias or {}).items()},
            # Each choice has a random stream of its own, or all would say the same.
            seed=None if body.seed is None else (body.seed + place) % 2**63,
            max_new_tokens=max_new_tokens,
            stop_ids=(self.tokenizer.eod_id,),
        )

    async def _constraints(self, grammar: Grammar | None, count: int) -> Sequence[Constraint | None]:
        if grammar is None:
            return [None] * count
        async with self._grammars_lock:
            if self._grammars is None:
                self._grammars = await asyncio.to_thread(Grammars, self.tokenizer)
        first = await self._compiled(self._grammars, grammar)
        return [first, *(first.fresh() for _ in range(count - 1))]

    async def _compiled(self, grammars: Grammars, grammar: Grammar) -> GrammarConstraint:
        """Raises UsageError for a grammar that is none, too large, or takes too long."""
        size = len(dumps(grammar))
        if size > MAX_GRAMMAR_BYTES:
            raise UsageError(
                f"the grammar (schemas of tools included) has {size:,} bytes, the limit is {MAX_GRAMMAR_BYTES:,}; "
                "make it smaller"
            )
        work = asyncio.get_running_loop().run_in_executor(self._compilers, _prepared, grammars, grammar)
        try:
            async with asyncio.timeout(GRAMMAR_S):
                return await work
        except TimeoutError:
            raise UsageError(f"the grammar takes more than {GRAMMAR_S:g} s to prepare; make it simpler") from None


def _prepared(grammars: Grammars, grammar: Grammar) -> GrammarConstraint:
    """A grammar whose first mask was drawn: what grows only then must not grow in the engine, where all wait for it."""
    constraint = grammars.compile(grammar)
    constraint.mask()
    return constraint


PENALTIES = ("presence_penalty", "frequency_penalty")


def _token_id(name: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", name):
        raise UsageError(f'logit_bias names {name[:40]!r}; its keys are token ids, such as "198"')
    return int(name)


def _guided(body: GenerationFields) -> Grammar | None:
    if body.guided_regex is not None and body.guided_grammar is not None:
        raise UsageError("guided_regex and guided_grammar exclude each other; leave one out")
    text = body.guided_regex or body.guided_grammar or ""
    if len(text) > MAX_GRAMMAR_BYTES:
        raise UsageError(
            f"the grammar has {len(text):,} characters, the limit is {MAX_GRAMMAR_BYTES:,}; make it smaller"
        )
    if body.guided_regex is not None:
        return regex_grammar(body.guided_regex)
    return None if body.guided_grammar is None else lark_grammar(body.guided_grammar)


def check_tokens(tokenizer: Tokenizer, ids: Sequence[int]) -> None:
    """Raises UsageError for an id of no token."""
    unknown = next((token_id for token_id in ids if token_id >= tokenizer.vocab_size), None)
    if unknown is not None:
        raise UsageError(f"token id {unknown} is outside 0..{tokenizer.vocab_size - 1}")


async def off_loop(work: Callable[[], T], characters: int) -> T:
    """Does work on a text, in another thread if the text is long."""
    return await asyncio.to_thread(work) if characters > LONG_TEXT else work()


async def updates(job: Job, answers: Sequence[Answer]) -> AsyncIterator[list[Update]]:
    """What comes to the answers, choices that move together in one list; ends what a stop string ended."""
    while outputs := await job.outputs():
        by_choice: dict[int, list[RequestOutput]] = {}
        for index, output in outputs:
            by_choice.setdefault(index, []).append(output)
        moved = []
        for index, some in by_choice.items():
            if answers[index].finish_reason is None:
                moved.append((index, answers[index].push(some)))
                if answers[index].stopped:
                    job.end(index, "stop")
        yield moved


def stop_texts(body: GenerationFields) -> list[str]:
    return [body.stop] if isinstance(body.stop, str) else body.stop or []


def new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"


def usage(prompts: Sequence[Sequence[int]], answers: Sequence[Answer]) -> dict[str, Any]:
    """Tokens of each prompt once, and of all answers."""
    choices = len(answers) // len(prompts)
    read = sum(map(len, prompts))
    written = sum(answer.num_tokens for answer in answers)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": sum(answer.reused_tokens for answer in answers[::choices])},
    }
