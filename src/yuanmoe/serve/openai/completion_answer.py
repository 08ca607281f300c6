"""The answers to a completion request in the shape of the OpenAI API: one object, or chunks of the same shape.

Source: the OpenAI API's completion object; `routing` in a choice is ours.
"""

import codecs
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import Any

from yuanmoe.serve.core.answer import LOWEST, Answer, Delta, token_name
from yuanmoe.serve.core.job import Job
from yuanmoe.serve.core.routing import encode_routings
from yuanmoe.serve.core.service import Service, new_id, stop_texts, updates, usage
from yuanmoe.serve.openai.events import event
from yuanmoe.serve.openai.schema import CompletionRequest
from yuanmoe.text.answer_text import unfinished_bytes


class CompletionAnswer:
    """The choices of one request: `n` for each prompt, in the order of the prompts."""

    def __init__(self, service: Service, prompts: Sequence[list[int]], body: CompletionRequest, job: Job) -> None:
        self._prompts = prompts
        self._job = job
        self._choices = [_Choice(service, ids, body, index) for index, ids in enumerate(_each(prompts, body.n))]
        self._answers = [choice.answer for choice in self._choices]
        self._with_usage = body.stream_options is not None and body.stream_options.include_usage
        self._common = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": int(time.time()),
            **service.identity(body.model),
            **service.warnings(prompts, body.max_tokens),
        }

    async def whole(self) -> dict[str, Any]:
        """The finished answers."""
        said = [Delta() for _ in self._choices]
        async for moved in updates(self._job, self._answers):
            for index, delta in moved:
                said[index].extend(delta)
        choices = [choice.read(delta) for choice, delta in zip(self._choices, said, strict=True)]
        return self._common | {"choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """The answers as they come; choices that move together leave together."""
        async for moved in updates(self._job, self._answers):
            read = [self._choices[index].read(delta) for index, delta in moved]
            if said := b"".join(self._event([choice], None) for choice in read if _says_something(choice)):
                yield said
        if self._with_usage:
            yield self._event([], self._usage())

    def _event(self, choices: list[dict[str, Any]], total: dict[str, Any] | None) -> bytes:
        chunk = self._common | {"choices": choices}
        return event(chunk | {"usage": total} if self._with_usage else chunk)

    def _usage(self) -> dict[str, Any]:
        total = usage(self._prompts, self._answers)
        unseen = sum(choice.num_unseen for choice in self._choices)
        return total | {name: total[name] - unseen for name in ("completion_tokens", "total_tokens")}


class _Choice:
    """One answer, after its prompt where that is echoed."""

    def __init__(self, service: Service, ids: Sequence[int], body: CompletionRequest, index: int) -> None:
        self.answer = Answer(service.tokenizer, ids, stop_texts(body))
        self._tokenizer = service.tokenizer
        self._ids = ids
        self._index = index
        self._echo = body.echo
        self._logprobs = body.logprobs
        self._scoring = body.max_tokens == 0
        self._listing = None if body.logprobs is None else _Listing(body.logprobs)
        self._position = len(ids) - 1

    @property
    def num_unseen(self) -> int:
        """Tokens that were generated only because scoring a prompt takes a pass."""
        return self.answer.num_tokens if self._scoring else 0

    def read(self, delta: Delta) -> dict[str, Any]:
        """A delta as a choice of the API."""
        text = ""
        if self._echo:
            self._echo = False
            # A character that the prompt begins and the answer ends is the answer's.
            text = self._tokenizer.decode(self._ids)
            if not self._scoring and unfinished_bytes(self._tokenizer, self._ids):
                text = text[:-1]
            self._list_prompt()
        if not self._scoring:
            text += delta.text
            self._list(delta)
        choice: dict[str, Any] = {
            "index": self._index,
            "text": text,
            "logprobs": None if self._listing is None else self._listing.take(),
            "finish_reason": "length" if self._scoring else self.answer.finish_reason,
        }
        if delta.routings:
            choice["routing"] = encode_routings(delta.routings, self._position)
            self._position += len(delta.routings)
        return choice

    def _list_prompt(self) -> None:
        scores = self.answer.prompt
        if self._listing is None or scores is None:
            return
        tops = scores.top or [()] * len(scores.logprobs)
        previous = None
        for token_id, logprob, top in zip(self._ids, [None, *scores.logprobs], [(), *tops], strict=True):
            self._listing.add(self._tokenizer.surface(token_id, previous), logprob, self._named(top))
            previous = token_id

    def _list(self, delta: Delta) -> None:
        if self._listing is not None:
            for said in delta.tokens:
                self._listing.add(said.surface, said.logprob, self._named(said.top))

    def _named(self, top: Iterable[tuple[int, float]]) -> list[tuple[bytes, float]]:
        return [(self._tokenizer.token_bytes(token_id), logprob) for token_id, logprob in top]


class _Listing:
    """Tokens with their log-probabilities, in the four lists of the completion object."""

    def __init__(self, num_top: int) -> None:
        self._num_top = num_top
        self._offset = 0
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._rows: list[tuple[str, float | None, dict[str, float] | None, int]] = []

    def add(self, data: bytes, logprob: float | None, top: Sequence[tuple[bytes, float]]) -> None:
        """The next token; without a `logprob` it is the first of a prompt, which nothing precedes."""
        name = token_name(data)
        likeliest = {token_name(other): max(value, LOWEST) for other, value in top}
        if logprob is not None:
            logprob = max(logprob, LOWEST)
            likeliest.setdefault(name, logprob)
        listed = likeliest if self._num_top and logprob is not None else None
        self._rows.append((name, logprob, listed, self._offset))
        self._offset += len(self._characters.decode(data))

    def take(self) -> dict[str, Any]:
        """The tokens that were added since the last call."""
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        columns = list(zip(*self._rows, strict=True)) or [(), (), (), ()]
        self._rows = []
        lists: dict[str, Any] = {name: list(column) for name, column in zip(names, columns, strict=True)}
        return lists if self._num_top else lists | {"top_logprobs": None}


def _each(prompts: Sequence[list[int]], n: int) -> Iterator[list[int]]:
    """The prompt of each choice."""
    return (prompt for prompt in prompts for _ in range(n))


def _says_something(choice: dict[str, Any]) -> bool:
    listed = choice["logprobs"] is not None and choice["logprobs"]["tokens"]
    return bool(choice["text"] or choice["finish_reason"] or listed or "routing" in choice)
