"""The answers to a chat in the shapes of the OpenAI API: one object, or chunks of it as they come.

Source: the OpenAI API's chat completion and chat completion chunk objects; `routing` in a choice is ours.
"""

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from yuanmoe.serve.core.answer import LOWEST, Answer, Delta, Said, token_name
from yuanmoe.serve.core.job import Job
from yuanmoe.serve.core.routing import encode_routings
from yuanmoe.serve.core.service import Service, new_id, stop_texts, updates, usage
from yuanmoe.serve.openai.events import event
from yuanmoe.serve.openai.schema import ChatRequest
from yuanmoe.serve.openai.tools import Arguments, CallBegin, CallParser, Tools

Piece = str | CallBegin | Arguments


class ChatAnswer:
    """The choices of one request."""

    def __init__(
        self, service: Service, ids: Sequence[int], body: ChatRequest, job: Job, *, tools: Tools | None
    ) -> None:
        self._ids = ids
        self._job = job
        self._choices = [_Choice(service, ids, body, tools) for _ in range(body.n)]
        self._answers = [choice.answer for choice in self._choices]
        self._with_usage = body.stream_options is not None and body.stream_options.include_usage
        self._common = {
            "id": new_id("chatcmpl"),
            "created": int(time.time()),
            **service.identity(body.model),
            **service.warnings([ids], body.token_limit),
        }

    async def whole(self) -> dict[str, Any]:
        """The finished answers."""
        said = [Delta() for _ in self._choices]
        async for moved in updates(self._job, self._answers):
            for index, delta in moved:
                said[index].extend(delta)
        choices = [
            choice.whole(index, delta) for index, (choice, delta) in enumerate(zip(self._choices, said, strict=True))
        ]
        return self._common | {
            "object": "chat.completion",
            "choices": choices,
            "usage": usage([self._ids], self._answers),
        }

    async def events(self) -> AsyncIterator[bytes]:
        """The answers as they come; choices that move together leave together."""
        yield self._chunk([_part(index, {"role": "assistant", "content": ""}) for index in range(len(self._choices))])
        async for parts in self.parts():
            yield self._chunk(parts)
        if self._with_usage:
            yield self._event([], self.usage())

    async def parts(self) -> AsyncIterator[list[dict[str, Any]]]:
        """The choices of the chunks of a stream, those that move together in one list."""
        async for moved in updates(self._job, self._answers):
            parts = [part for index, delta in moved for part in self._choices[index].parts(index, delta)]
            if parts:
                yield parts

    def usage(self) -> dict[str, Any]:
        """Tokens so far."""
        return usage([self._ids], self._answers)

    def _chunk(self, parts: Sequence[dict[str, Any]]) -> bytes:
        # One choice an event, as clients are used to.
        return b"".join(self._event([part], None) for part in parts)

    def _event(self, choices: list[dict[str, Any]], total: dict[str, Any] | None) -> bytes:
        chunk = self._common | {"object": "chat.completion.chunk", "choices": choices}
        return event(chunk | {"usage": total} if self._with_usage else chunk)


class _Choice:
    """One answer: its text, calls, log-probabilities and routing."""

    def __init__(self, service: Service, ids: Sequence[int], body: ChatRequest, tools: Tools | None) -> None:
        self.answer = Answer(service.tokenizer, ids, stop_texts(body))
        self._tokenizer = service.tokenizer
        structured = body.response_format is not None and body.response_format.type != "text"
        self._calls = None if tools is None else CallParser(tools.names, calls_first=structured)
        self._num_calls = 0
        self._logprobs = bool(body.logprobs)
        self._position = len(ids) - 1

    def whole(self, index: int, said: Delta) -> dict[str, Any]:
        """The choice of a finished answer."""
        pieces, extras = self._read(said)
        message: dict[str, Any] = {"role": "assistant", "content": _text(pieces), "refusal": None}
        if calls := _calls(pieces):
            message |= {"content": message["content"] or None, "tool_calls": calls}
        choice = {"index": index, "message": message, "logprobs": None, "finish_reason": self._finish_reason}
        return choice | extras

    def parts(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """The choices of the chunks that say a delta: what it adds, if anything, and the end, if this is it."""
        pieces, extras = self._read(delta)
        added: dict[str, Any] = {}
        if text := _text(pieces):
            added["content"] = text
        if calls := self._call_pieces(pieces):
            added["tool_calls"] = calls
        parts = [_part(index, added) | extras] if added or extras else []
        if self._finish_reason is not None:
            parts.append(_part(index, {}, self._finish_reason))
        return parts

    def _call_pieces(self, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        """What a chunk says of calls: each once with its name, and what is new of its arguments."""
        place = self._num_calls - sum(isinstance(piece, CallBegin) for piece in pieces) - 1
        said: list[dict[str, Any]] = []
        for piece in pieces:
            if isinstance(piece, CallBegin):
                place += 1
                said.append({"index": place} | _call(piece))
            elif isinstance(piece, Arguments):
                if not said or said[-1]["index"] != place:
                    said.append({"index": place, "function": {"arguments": ""}})
                said[-1]["function"]["arguments"] += piece.json
        return said

    @property
    def _finish_reason(self) -> str | None:
        reason = self.answer.finish_reason
        return "tool_calls" if reason == "stop" and self._num_calls else reason

    def _read(self, delta: Delta) -> tuple[list[Piece], dict[str, Any]]:
        """A delta's text and calls, and what was asked for about its tokens."""
        pieces: list[Piece] = [delta.text]
        if self._calls is not None:
            pieces = list(self._calls.push(delta.text))
            pieces += self._calls.flush() if self.answer.finish_reason is not None else ()
            self._num_calls += sum(isinstance(piece, CallBegin) for piece in pieces)
        extras: dict[str, Any] = {}
        if self._logprobs and delta.tokens:
            extras["logprobs"] = {"content": [self._logprob(said) for said in delta.tokens], "refusal": None}
        if delta.routings:
            extras["routing"] = encode_routings(delta.routings, self._position)
            self._position += len(delta.routings)
        return pieces, extras

    def _logprob(self, said: Said) -> dict[str, Any]:
        others = [_token(self._tokenizer.token_bytes(token_id), logprob) for token_id, logprob in said.top]
        return _token(said.surface, said.logprob) | {"top_logprobs": others}


def _part(index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _text(pieces: Sequence[Piece]) -> str:
    return "".join(piece for piece in pieces if isinstance(piece, str))


def _calls(pieces: Sequence[Piece]) -> list[dict[str, Any]]:
    """The calls as a whole."""
    calls: list[dict[str, Any]] = []
    for piece in pieces:
        if isinstance(piece, CallBegin):
            calls.append(_call(piece))
        elif isinstance(piece, Arguments):
            calls[-1]["function"]["arguments"] += piece.json
    return calls


def _call(begin: CallBegin) -> dict[str, Any]:
    return {"id": begin.id, "type": "function", "function": {"name": begin.name, "arguments": ""}}


def _token(data: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token_name(data), "logprob": max(logprob, LOWEST), "bytes": list(data)}
