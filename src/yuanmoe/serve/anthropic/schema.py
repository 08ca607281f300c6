"""The bodies of Anthropic's Messages API, and the chat request that each of them is.

Source: the Messages API (`/v1/messages`, version 2023-06-01). Fields that are not read here are ignored: clients of
this API send many that concern a service elsewhere. Not here: images and documents, which are refused.
"""

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from yuanmoe.errors import UsageError
from yuanmoe.serve.openai.schema import ChatRequest

ChatMessage = dict[str, Any]
CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class Body(BaseModel):
    """No numbers in strings, no NaN."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class Block(Body):
    """A piece of content: text, a call, or a call's result."""

    type: str
    text: str = ""
    id: str = ""
    name: str = ""
    input: dict[str, Any] = {}
    tool_use_id: str = ""
    content: "str | Blocks | None" = None


Blocks = Annotated[list[Block], Field(fail_fast=True, max_length=1024)]


class ClientTurn(Body):
    role: Literal["user", "assistant"]
    content: str | Blocks


class ClientTool(Body):
    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class CountRequest(Body):
    """`POST /v1/messages/count_tokens`."""

    model: str | None = None
    messages: Annotated[list[ClientTurn], Field(fail_fast=True, min_length=1, max_length=4096)]
    system: str | Blocks | None = None
    tools: Annotated[list[ClientTool], Field(fail_fast=True, max_length=128)] | None = None
    tool_choice: ToolChoice | None = None

    def chat(self) -> dict[str, Any]:
        """The same as a chat request. Raises UsageError for content that cannot be read."""
        system = [] if self.system is None else [{"role": "system", "content": _text(self.system)}]
        turns = [message for turn in self.messages for message in _messages(turn)]
        body: dict[str, Any] = {"model": self.model, "messages": [*system, *turns]}
        if self.tools:
            body["tools"] = [
                {"type": "function", "function": {"name": tool.name, "description": tool.description,
                                                  "parameters": tool.input_schema}}
                for tool in self.tools
            ]  # fmt: skip
        if self.tool_choice is not None:
            named = {"type": "function", "function": {"name": self.tool_choice.name or ""}}
            body["tool_choice"] = CHOICES.get(self.tool_choice.type, named)
            body["parallel_tool_calls"] = not self.tool_choice.disable_parallel_tool_use
        return body


class MessagesRequest(CountRequest):
    """`POST /v1/messages`."""

    max_tokens: int = Field(ge=1)
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: Annotated[list[str], Field(fail_fast=True, max_length=16)] | None = None

    def chat_request(self) -> ChatRequest:
        """The chat that this asks for. Raises UsageError, and pydantic's ValidationError."""
        same = ("max_tokens", "stream", "temperature", "top_p", "top_k")
        fields = {name: value for name in same if (value := getattr(self, name)) is not None}
        return ChatRequest.model_validate(self.chat() | fields | {"stop": self.stop_sequences})


def _messages(turn: ClientTurn) -> Iterator[ChatMessage]:
    """The chat messages of a turn: results of calls are messages of their own there."""
    blocks = [Block(type="text", text=turn.content)] if isinstance(turn.content, str) else turn.content
    for block in blocks:
        if block.type == "tool_result":
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": _text(block.content or "")}
    calls = [
        {"id": block.id, "function": {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}}
        for block in blocks
        if block.type == "tool_use"
    ]
    text = _text([block for block in blocks if block.type not in ("tool_result", "tool_use")])
    if turn.role == "assistant":
        yield {"role": "assistant", "content": text, "tool_calls": calls}
    elif text:
        yield {"role": "user", "content": text}


def _text(content: str | list[Block]) -> str:
    """The text of contents; what was thought before is no part of the prompt."""
    if isinstance(content, str):
        return content
    for block in content:
        if block.type not in ("text", "thinking", "redacted_thinking"):
            raise UsageError(f"a content block is of type {block.type[:40]!r}; this model reads text alone")
    return "".join(block.text for block in content if block.type == "text")
