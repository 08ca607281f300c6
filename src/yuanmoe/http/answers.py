"""Answers as they go out: JSON and errors.

JSON is ASCII: no lone surrogate of a request can break its error, and no reader that splits lines at U+2028 a stream.
"""

import json
import logging
from collections.abc import Sequence
from typing import Any

from starlette.responses import Response

from yuanmoe.http.errors import ApiError, api_error

ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)

PIECE = 10_000
"""Ids that are written at once."""

log = logging.getLogger(__name__)


def dumps(value: Any) -> bytes:
    return ENCODER.encode(value).encode()


def ids_first(ids: Sequence[int], others: dict[str, Any]) -> bytes:
    """`{"tokens": [...], ...}`, written in pieces, between which other threads run."""
    pieces = (dumps(ids[at : at + PIECE])[1:-1] for at in range(0, len(ids), PIECE))
    return b'{"tokens":[' + b",".join(pieces) + b"]," + dumps(others)[1:]


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dumps(value), status, headers, media_type="application/json")


def error_response(error: Exception) -> Response:
    """The answer to an error."""
    answer = logged(error)
    return json_response(answer.body, answer.status, answer.headers)


def logged(error: Exception) -> ApiError:
    """The error for who asked; one that is ours goes to the log with its traceback."""
    answer = api_error(error)
    if answer.status == 500:
        log.error("a request failed", exc_info=error)
    return answer
