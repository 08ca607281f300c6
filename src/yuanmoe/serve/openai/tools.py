"""Calling functions with models that were never taught a format for it: a convention in plain text, and its parser.

The functions are described before the conversation, one JSON object a line. A call is
`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, and its result comes back as a question,
`<tool_result>...</tool_result>`. A grammar holds every call to the functions' schemas, also where the model is free to
call or not (it then governs only what follows `<tool_call>`). The released chat format has no place for tools of its
own (its one special token ends the question), so this is ours; the tags are those that most open models were tuned on.
"""

import json
import secrets
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from yuanmoe.errors import UsageError
from yuanmoe.serve.openai.schema import ChatRequest, FunctionTool, NamedTool, ToolCall
from yuanmoe.serve.openai.structured import Grammar, json_schema, lark_grammar

OPEN, CLOSE = "<tool_call>", "</tool_call>"
RESULT = "<tool_result>{}</tool_result>"


class ParsedCall(NamedTuple):
    """A function that the model wants called."""

    id: str
    name: str
    arguments: str
    """JSON."""


class Tools:
    """The functions of one request: how the model is told of them, and what it may say."""

    def __init__(self, functions: Sequence[FunctionTool], *, forced: bool, parallel: bool) -> None:
        self._functions = functions
        self._forced = forced
        self._parallel = parallel

    def prompt(self) -> str:
        """What stands before the conversation."""
        lines = [json.dumps(_description(function), ensure_ascii=False) for function in self._functions]
        must = "You must call a function now" if self._forced else "To call a function"
        return "\n".join(
            [
                "You can call these functions:",
                *lines,
                f'{must}: write a line {OPEN}{{"name": "...", "arguments": {{...}}}}{CLOSE} for each call.',
                f"The result comes back as {RESULT.format('...')}",
            ]
        )

    def grammar(self) -> Grammar:
        """Calls alone where one is forced, else any text with calls in it."""
        # Each schema is a root of its own, so that its `$ref`s hold.
        rules = [rule for place, function in enumerate(self._functions) for rule in _rules(place, function)]
        rules.append("body: " + " | ".join(f"body_{place}" for place in range(len(self._functions))))
        if self._forced:
            rules += [
                f'call: "{OPEN}" body "{CLOSE}"',
                'start: call ("\\n" call)*' if self._parallel else "start: call",
            ]
        else:
            rules += [
                r"TEXT: /(.|\n)*/",
                # A lazy lexeme ends as soon as it can: from the tag on only a call fits.
                f'open[lazy]: TEXT "{OPEN}"',
                f'call: open body "{CLOSE}"',
                "rest: TEXT",
                "start: call* rest" if self._parallel else "start: call? rest",
            ]
        return lark_grammar("\n".join(rules))


def chosen_tools(body: ChatRequest) -> Tools | None:
    """The tools that a request lets the model use. Raises UsageError for a choice that makes no sense."""
    choice = body.tool_choice or "auto"
    if not body.tools:
        if body.tool_choice not in (None, "none", "auto"):
            raise UsageError("tool_choice needs tools; describe them, or leave it out")
        return None
    functions = [tool.function for tool in body.tools]
    names = [function.name for function in functions]
    if len(set(names)) < len(names):
        raise UsageError(f"tools has {len(names)} functions with {len(set(names))} names; give each its own")
    if isinstance(choice, NamedTool):
        name = choice.function.name
        if name not in names:
            raise UsageError(f"tool_choice names {name!r}, which is none of the tools: {', '.join(names)}")
        return Tools([functions[names.index(name)]], forced=True, parallel=False)
    if choice == "none":
        return None
    return Tools(functions, forced=choice == "required", parallel=body.parallel_tool_calls is not False)


def call_text(call: ToolCall) -> str:
    """A call of an earlier answer, as the model writes it. Raises UsageError for arguments that are no JSON."""
    try:
        arguments = json.loads(call.function.arguments) if call.function.arguments.strip() else {}
    except ValueError as error:
        raise UsageError(f"the arguments of tool call {call.id!r} are no JSON: {error}") from None
    return OPEN + json.dumps({"name": call.function.name, "arguments": arguments}, ensure_ascii=False) + CLOSE


class CallParser:
    """Tells calls from text while both arrive; what only looks like a call is text."""

    def __init__(self) -> None:
        self._held = ""
        self._called = False

    def push(self, text: str) -> Iterator[str | ParsedCall]:
        """Text and calls that are whole now; an opened call is held back until it is closed."""
        self._held += text
        while (start := self._held.find(OPEN)) >= 0:
            if start:
                yield from self._text(self._held[:start])
                self._held = self._held[start:]
            found = _parse(self._held) if CLOSE in self._held else None
            if found is None:
                return
            call, end = found
            self._held = self._held[end:]
            self._called = True
            yield call
        sure = len(self._held) - _overlap(self._held, OPEN)
        ready, self._held = self._held[:sure], self._held[sure:]
        yield from self._text(ready)

    def flush(self) -> Iterator[str | ParsedCall]:
        """What was held back, when nothing follows: text, since a call would have been closed."""
        held, self._held = self._held, ""
        yield from self._text(held)

    def _text(self, text: str) -> Iterator[str]:
        # Newlines between and after calls separate them, and say nothing.
        if text and not (self._called and text.isspace()):
            yield text


def _parse(text: str) -> tuple[ParsedCall, int] | None:
    """The call that a text begins with, and where it ends."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, len(OPEN))
    except (ValueError, RecursionError):
        return None
    if not text.startswith(CLOSE, end) or not isinstance(value, dict):
        return None
    name, arguments = value.get("name"), value.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    call = ParsedCall(f"call_{secrets.token_hex(12)}", name, json.dumps(arguments, ensure_ascii=False))
    return call, end + len(CLOSE)


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` with which `tag` begins."""
    return next((size for size in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:size])), 0)


def _description(function: FunctionTool) -> dict[str, Any]:
    return {key: value for key, value in function.model_dump().items() if value is not None and key != "strict"}


def _rules(place: int, function: FunctionTool) -> Iterator[str]:
    """What a call of the function holds between its tags."""
    schema = {"type": "object"} | (function.parameters or {"additionalProperties": False})
    begin = f'{{"name": {json.dumps(function.name)}, "arguments": '
    yield f'body_{place}: {json.dumps(begin)} arguments_{place} "}}"'
    yield f"arguments_{place}: %json {json.dumps(json_schema(schema, lenient=not function.strict))}"
