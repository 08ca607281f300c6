"""Strangers' JSON: counted before it is parsed, and parsed in one short step.

A body of the allowed size can hold millions of values, each of which becomes a Python object while every other request
waits. So the bytes are counted first: numpy does that outside Python's lock, in pieces of bounded memory.
Not here: what a body must hold (pydantic, with lists that end at their first error).
"""

import asyncio
import math
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import numpy as np
import pydantic_core
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from yuanmoe.http.errors import ApiError

MAX_VALUES = 100_000
"""Values of a body, roughly: its commas. As many are parsed and validated within some 20 ms."""
MAX_CONTAINERS = 20_000
"""Objects and lists, which take longer and more memory than numbers and texts."""
MAX_KEYS = 1024
"""Of one object: each key that is not known would become an error of its own."""
MAX_DEPTH = 100
"""Objects and lists inside each other; the parser itself gives up at 200."""
PIECE = 2**18
"""Bytes that are counted at once."""
SMALL = 2**14
"""Bytes that are parsed without leaving the event loop."""

QUOTE, BACKSLASH, COMMA = b'"\\,'
OPEN, CLOSE = b"{[", b"}]"


@dataclass(slots=True)
class _Count:
    """What was counted up to here."""

    inside: bool = False
    """Whether the last byte was inside a string."""
    depth: int = 0
    deepest: int = 0
    commas: int = 0
    containers: int = 0


def parse_json(body: bytes, max_values: int = MAX_VALUES) -> Any:
    """The value of a JSON text. Raises ApiError, 400, where it is not JSON, or more than the bounds allow."""
    _check_counts(body, max_values)
    try:
        value = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    _check_values(value)
    return value


def bounded_route(max_values: int) -> type[APIRoute]:
    """A kind of route whose bodies are read by `parse_json`, off the event loop unless they are small."""

    class BoundedRequest(Request):
        async def json(self) -> Any:
            body = await self.body()
            if len(body) <= SMALL:
                return parse_json(body, max_values)
            return await asyncio.to_thread(parse_json, body, max_values)

    class BoundedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handler = super().get_route_handler()

            async def handle(request: Request) -> Response:
                return await handler(BoundedRequest(request.scope, request.receive))

            return handle

    return BoundedRoute


def _check_counts(body: bytes, max_values: int) -> None:
    count, start = _Count(), 0
    while start < len(body):
        end = min(start + PIECE, len(body))
        # A piece never ends between a backslash and what it escapes.
        if end < len(body) and body[end - 1] == BACKSLASH:
            end = min(len(body), len(body) - len(body[end:].lstrip(b"\\")) + 1)
        _add(count, body[start:end])
        start = end
        if count.commas >= max_values or count.containers > MAX_CONTAINERS:
            raise ApiError(
                400,
                f"the body holds more than {max_values:,} values, or more than {MAX_CONTAINERS:,} lists and objects; "
                "this server reads no more in one request: send it in parts",
                code="body_too_complex",
            )
        if count.deepest > MAX_DEPTH:
            raise ApiError(
                400, f"lists and objects of the body are more than {MAX_DEPTH} deep; flatten it", code="body_too_deep"
            )


def _add(count: _Count, piece: bytes) -> None:
    # Pairs first: what is left of a run of backslashes before a quote escapes it.
    plain = piece.replace(b"\\\\", b"__").replace(b'\\"', b"__") if BACKSLASH in piece else piece
    data = np.frombuffer(plain, dtype=np.uint8)
    inside = np.logical_xor.accumulate(data == QUOTE) ^ count.inside
    count.inside = bool(inside[-1])
    outside = data[~inside]
    opens = (outside == OPEN[0]) | (outside == OPEN[1])
    closes = (outside == CLOSE[0]) | (outside == CLOSE[1])
    count.commas += int(np.count_nonzero(outside == COMMA))
    count.containers += int(np.count_nonzero(opens))
    if opens.any() or closes.any():
        depth = count.depth + np.cumsum(opens.astype(np.int32) - closes)
        count.deepest = max(count.deepest, int(depth.max()))
        count.depth = int(depth[-1])


def _check_values(value: Any) -> None:
    """Raises ApiError for an object with too many keys, and for numbers that no float holds; visits each value once."""
    waiting: list[Any] = [[value]]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict) and len(each) > MAX_KEYS:
            raise ApiError(
                400, f"an object of the body has {len(each):,} keys, the limit is {MAX_KEYS:,}", code="body_too_complex"
            )
        for item in each.values() if isinstance(each, dict) else each:
            if isinstance(item, dict | list):
                waiting.append(item)
            elif isinstance(item, float) and math.isinf(item):
                raise ApiError(400, "a number of the body is too large for 64 bits", code="invalid_json")
