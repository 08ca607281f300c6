"""`/v1/messages` and `/v1/messages/count_tokens`: a chat whose answer leaves in blocks, or in the events of a stream.

Source: Anthropic's Messages API and its streaming events (message_start, content_block_*, message_delta, message_stop).
"""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import FastAPI
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from yuanmoe.http.answers import json_response
from yuanmoe.serve.anthropic.schema import CountRequest, MessagesRequest
from yuanmoe.serve.core.service import Service, new_id
from yuanmoe.serve.openai.chat import ask, chat_ids
from yuanmoe.serve.openai.chat_answer import ChatAnswer
from yuanmoe.serve.openai.events import EventStream, dumps, with_reader
from yuanmoe.serve.openai.invalid import invalid_body
from yuanmoe.serve.openai.schema import ChatRequest
from yuanmoe.serve.openai.tools import chosen_tools

REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def add_messages(app: FastAPI, service: Service) -> None:
    """The two paths."""

    @app.post("/v1/messages")
    async def messages(body: MessagesRequest, request: Request) -> Response:
        """Answer a conversation in the shapes of Anthropic's Messages API."""
        try:
            chat = body.chat_request()
        except ValidationError as error:
            raise invalid_body(error.errors(), body.model_dump()) from None
        answer, job = await ask(service, chat)
        if body.stream:
            return EventStream(job, service.timeout_s, _events(answer, service, body), last=b"")
        whole = await with_reader(request, job, service.timeout_s, answer.whole())
        return json_response(_message(whole, service, body))

    @app.post("/v1/messages/count_tokens")
    async def count_tokens(body: CountRequest) -> Response:
        """Tokens of the prompt that a conversation is."""
        service.check_model(body.model)
        try:
            chat = ChatRequest.model_validate(body.chat())
        except ValidationError as error:
            raise invalid_body(error.errors(), body.model_dump()) from None
        return json_response({"input_tokens": len(await chat_ids(service, chat.messages, chosen_tools(chat)))})


def _message(whole: dict[str, Any], service: Service, body: MessagesRequest) -> dict[str, Any]:
    choice = whole["choices"][0]
    said = choice["message"]
    content: list[dict[str, Any]] = [{"type": "text", "text": said["content"]}] if said["content"] else []
    content += [
        {"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": _input(call)}
        for call in said.get("tool_calls", [])
    ]
    return _head(service, body) | {
        "content": content,
        "stop_reason": REASONS[choice["finish_reason"]],
        "usage": _usage(whole["usage"]),
    }


def _input(call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call; none of one that was cut, as half of them are no JSON."""
    try:
        return json.loads(call["function"]["arguments"] or "{}")
    except ValueError:
        return {}


def _head(service: Service, body: MessagesRequest) -> dict[str, Any]:
    return {
        "id": new_id("msg"),
        "type": "message",
        "role": "assistant",
        "model": service.identity(body.model)["model"],
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


def _usage(total: dict[str, Any]) -> dict[str, int]:
    return {"input_tokens": total["prompt_tokens"], "output_tokens": total["completion_tokens"]}


async def _events(answer: ChatAnswer, service: Service, body: MessagesRequest) -> AsyncIterator[bytes]:
    usage = _usage(answer.usage())
    yield _event("message_start", message=_head(service, body) | {"usage": usage})
    blocks = _Blocks()
    reason = None
    async for parts in answer.parts():
        for part in parts:
            reason = part["finish_reason"] or reason
            if said := b"".join(blocks.add(part["delta"])):
                yield said
    yield b"".join(blocks.end())
    delta = {"stop_reason": REASONS[reason or "stop"], "stop_sequence": None}
    yield _event("message_delta", delta=delta, usage=_usage(answer.usage()))
    yield _event("message_stop")


class _Blocks:
    """The blocks of a streamed answer, one open at a time."""

    def __init__(self) -> None:
        self._place = -1
        self._open: str | None = None

    def add(self, delta: dict[str, Any]) -> Iterator[bytes]:
        """What a chunk of a chat adds."""
        if text := delta.get("content"):
            if self._open != "text":
                yield from self._begin("text", {"type": "text", "text": ""})
            yield self._delta({"type": "text_delta", "text": text})
        for call in delta.get("tool_calls", []):
            if "id" in call:
                block = {"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": {}}
                yield from self._begin("tool_use", block)
            if written := call["function"]["arguments"]:
                yield self._delta({"type": "input_json_delta", "partial_json": written})

    def end(self) -> Iterator[bytes]:
        """Closes the open block."""
        if self._open is not None:
            yield _event("content_block_stop", index=self._place)
        self._open = None

    def _begin(self, kind: str, block: dict[str, Any]) -> Iterator[bytes]:
        yield from self.end()
        self._place += 1
        self._open = kind
        yield _event("content_block_start", index=self._place, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._place, delta=delta)


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + dumps({"type": kind} | fields) + b"\n\n"
