"""Calling functions with models that were never taught a format for it: a convention in plain text, and its parser.

The functions are described before the conversation, one JSON object a line. A call is
`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, and its result comes back as a question,
`<tool_result>...</tool_result>`. A grammar holds every call to the functions' schemas, also where the model is free to
call or not (it then governs only what follows `<tool_call>`). The released chat format has no place for tools of its
own (its one special token ends the question), so this is ours; the tags are those that most open models were tuned on.
"""

import json
import re
import secrets
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from yuanmoe.errors import UsageError
from yuanmoe.http.errors import ApiError
from yuanmoe.http.json_body import parse_json
from yuanmoe.serve.openai.schema import ChatRequest, FunctionTool, NamedTool, ToolCall
from yuanmoe.serve.openai.structured import Grammar, json_schema, lark_grammar

OPEN, CLOSE = "<tool_call>", "</tool_call>"
RESULT = "<tool_result>{}</tool_result>"


AFTER = "}" + CLOSE
HEADER = re.compile(re.escape(OPEN) + r'\{"name": ("[a-zA-Z0-9_-]{1,64}"), "arguments": (?=\{)')
PARTIAL_HEADER = re.compile(
    "|".join(re.escape('{"name": "'[:size]) for size in range(len('{"name": "') + 1))
    + r'|\{"name": "[a-zA-Z0-9_-]{1,64}(?:'
    + "|".join(re.escape('", "arguments": '[:size]) for size in range(len('", "arguments": ') + 1))
    + ")"
)
"""Everything that a call may begin with, as the grammar writes it."""


class CallBegin(NamedTuple):
    """A function that the model wants called; its arguments follow."""

    id: str
    name: str


class Arguments(NamedTuple):
    """A piece of the arguments of the call that began last."""

    json: str


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

    @property
    def names(self) -> list[str]:
        return [function.name for function in self._functions]

    def grammar(self, answer: dict[str, Any] | None = None) -> Grammar:
        """Calls alone where one is forced, else any text with calls in it; with the schema of an answer either calls,
        or the answer.
        """
        # Each schema is a root of its own, so that its `$ref`s hold.
        rules = [rule for place, function in enumerate(self._functions) for rule in _rules(place, function)]
        rules.append("body: " + " | ".join(f"body_{place}" for place in range(len(self._functions))))
        if self._forced:
            rules += [
                f'call: "{OPEN}" body "{CLOSE}"',
                'start: call ("\\n" call)*' if self._parallel else "start: call",
            ]
        elif answer is not None:
            rules += [
                f'call: "{OPEN}" body "{CLOSE}"',
                f"answer: %json {json.dumps(answer)}",
                'start: answer | call ("\\n" call)*' if self._parallel else "start: answer | call",
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
        text = call.function.arguments
        arguments = parse_json(text.encode(errors="replace")) if text.strip() else {}
    except ApiError as error:
        raise UsageError(f"the arguments of tool call {call.id!r} are no JSON: {error}") from None
    return OPEN + json.dumps({"name": call.function.name, "arguments": arguments}, ensure_ascii=False) + CLOSE


class CallParser:
    """Tells calls from text while both arrive; what only looks like a call is text.

    The arguments of a call come as they are written; a call that is cut has those that were written.
    """

    def __init__(self, names: Sequence[str] = (), *, calls_first: bool = False) -> None:
        """`names` tell which function was meant where its name is cut; with `calls_first`, text has no calls in it."""
        self._names = names
        self._calls_first = calls_first
        self._held = ""
        self._called = False
        self._said = False
        self._scan: _ArgumentsEnd | None = None
        self._after = False
        """Whether the arguments of a call are whole and its end is awaited."""

    def push(self, text: str) -> Iterator[str | CallBegin | Arguments]:
        """What is certain now."""
        self._held += text
        while True:
            if self._scan is not None:
                size = self._scan.push(self._held)
                if size:
                    yield Arguments(self._held[:size])
                self._held = self._held[size:]
                if not self._scan.ended:
                    return
                self._scan, self._after = None, True
            if self._after:
                if len(self._held) < len(AFTER) and AFTER.startswith(self._held):
                    return
                self._held = self._held.removeprefix(AFTER)
                self._after = False
            start = -1 if self._calls_first and self._said else self._held.find(OPEN)
            if start < 0:
                break
            if start:
                yield from self._text(self._held[:start])
                self._held = self._held[start:]
                continue
            begin = HEADER.match(self._held)
            if begin is None:
                if _may_begin(self._held):
                    return
                yield from self._text(OPEN)
                self._held = self._held[len(OPEN) :]
                continue
            self._held = self._held[begin.end() :]
            self._called = True
            self._scan = _ArgumentsEnd()
            yield CallBegin(new_call_id(), json.loads(begin[1]))
        sure = len(self._held) - (0 if self._calls_first and self._said else _overlap(self._held, OPEN))
        ready, self._held = self._held[:sure], self._held[sure:]
        yield from self._text(ready)

    def flush(self) -> Iterator[str | CallBegin | Arguments]:
        """What was held back, when nothing follows: of a call that was cut its name, if that is certain."""
        held, self._held = self._held, ""
        if self._after or self._scan is not None:
            return
        if self._names and held.startswith(OPEN):
            written = re.match(r'\{"name": "([^"]*)', held[len(OPEN) :])
            meant = [name for name in self._names if name.startswith(written[1] if written else "")]
            if len(meant) == 1:
                yield CallBegin(new_call_id(), meant[0])
            return
        yield from self._text(held)

    def _text(self, text: str) -> Iterator[str]:
        # Newlines between and after calls separate them, and say nothing.
        if text and not (self._called and text.isspace()):
            self._said = self._said or not text.isspace()
            yield text


class _ArgumentsEnd:
    """Finds where a JSON object ends, piece by piece."""

    def __init__(self) -> None:
        self._depth = 0
        self._inside_text = False
        self._escaped = False
        self.ended = False

    def push(self, text: str) -> int:
        """How many of these characters belong to the object."""
        for place, character in enumerate(text):
            if self._inside_text:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._inside_text = False
            elif character == '"':
                self._inside_text = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.ended = True
                    return place + 1
        return len(text)


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _may_begin(text: str) -> bool:
    """Whether what follows the tag may become a call."""
    return PARTIAL_HEADER.fullmatch(text[len(OPEN) :]) is not None


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
