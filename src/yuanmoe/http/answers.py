"""Answers as they go out: JSON and errors.

JSON is ASCII: no lone surrogate of a request can break its error, and no reader that splits lines at U+2028 a stream.
"""

import json
import logging
from typing import Any

from starlette.responses import Response

from yuanmoe.http.errors import ApiError, api_error

ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)

log = logging.getLogger(__name__)


def dumps(value: Any) -> bytes:
    return ENCODER.encode(value).encode()


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
