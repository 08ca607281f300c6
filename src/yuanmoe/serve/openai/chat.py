"""`/v1/chat/completions`: from a conversation to the engine; what comes back is `chat_answer`'s.

Not here: the format of the models (`data.chat`), the convention for tools (`tools`).
"""

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from yuanmoe.errors import UsageError
from yuanmoe.http.answers import json_response
from yuanmoe.serve.core.job import Job
from yuanmoe.serve.core.service import Service, off_loop
from yuanmoe.serve.openai.chat_answer import ChatAnswer
from yuanmoe.serve.openai.events import EventStream, with_reader
from yuanmoe.serve.openai.schema import ChatRequest, Message, RefusalPart, SchemaFormat, TextPart, ToolMessage
from yuanmoe.serve.openai.structured import Grammar, json_schema
from yuanmoe.serve.openai.tools import RESULT, Tools, call_text, chosen_tools
from yuanmoe.text.chat import encode_chat


async def chat_completion(service: Service, body: ChatRequest, request: Request) -> Response:
    """The response to a chat request."""
    chat, job = await ask(service, body)
    if body.stream:
        return EventStream(job, service.timeout_s, chat.events())
    return json_response(await with_reader(request, job, service.timeout_s, chat.whole()))


async def ask(service: Service, body: ChatRequest) -> tuple[ChatAnswer, Job]:
    """The answer to a chat request that begins, and the job that it comes from."""
    service.check_model(body.model)
    tools = chosen_tools(body)
    ids = await chat_ids(service, body.messages, tools)
    service.check_prompt(ids)
    job = await service.begin(
        [ids],
        body,
        max_new_tokens=body.token_limit,
        top_logprobs=body.top_logprobs or 0,
        grammar=_grammar(body, tools),
    )
    return ChatAnswer(service, ids, body, job, tools=tools), job


async def chat_ids(service: Service, messages: Sequence[Message], tools: Tools | None = None) -> list[int]:
    """The prompt that asks for the answer, however long. Raises UsageError where there is none."""
    # Off the event loop where there is much: arguments of calls are JSON inside JSON.
    turns = await off_loop(lambda: [_turn(message) for message in messages], sum(map(_characters, messages)))
    if tools is not None:
        turns.insert(0, {"role": "system", "content": tools.prompt()})
    characters = sum(len(turn["content"]) for turn in turns)
    service.check_text(characters)
    return await off_loop(lambda: encode_chat(service.tokenizer, turns), characters)


def _turn(message: Message) -> dict[str, str]:
    """A message in the format that the models know, which has no roles but these three."""
    text = _text(message.content)
    if isinstance(message, ToolMessage):
        return {"role": "user", "content": RESULT.format(text)}
    if message.role == "assistant":
        text = text or message.refusal or ""
        calls = [call_text(call) for call in message.tool_calls or []]
        return {"role": "assistant", "content": "\n".join([*([text] if text else []), *calls])}
    return {"role": "system" if message.role == "developer" else message.role, "content": text}


def _characters(message: Message) -> int:
    calls = message.tool_calls or [] if message.role == "assistant" else []
    parts = 0 if isinstance(message.content, str) or message.content is None else len(message.content)
    return 64 + 64 * parts + sum(len(call.function.arguments) for call in calls)


def _text(content: str | Sequence[TextPart | RefusalPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)


def _grammar(body: ChatRequest, tools: Tools | None) -> Grammar | None:
    """What the answer must follow. Raises UsageError where two things ask for it."""
    wanted = [name for name in ("guided_regex", "guided_grammar") if getattr(body, name) is not None]
    schema = _answer_schema(body)
    if schema is not None:
        wanted.append("response_format")
    if tools is not None and (not wanted or wanted == ["response_format"]):
        return tools.grammar(schema)
    if tools is not None:
        wanted.append("tools")
    if len(wanted) > 1:
        raise UsageError(f"{' and '.join(wanted)} exclude each other: each rules the whole answer; leave one out")
    return None if schema is None else {"json_schema": schema}


def _answer_schema(body: ChatRequest) -> dict[str, Any] | None:
    """The schema of the whole answer, where the request has one."""
    wanted = body.response_format
    if isinstance(wanted, SchemaFormat):
        return json_schema(wanted.json_schema.schema_, lenient=wanted.json_schema.strict is False)
    if wanted is not None and wanted.type == "json_object":
        return json_schema({"type": "object"}, lenient=False)
    return None
