"""What went wrong, in the shape that OpenAI clients read: one place that turns any error into a status and a body.

Texts are clipped here, once for all: a message may quote what a stranger sent, which can be megabytes long.

Source: the error object of the OpenAI API, `{"error": {"message", "type", "param", "code"}}`.
"""

import json
import math
import re
from typing import Any

from yuanmoe.errors import ContextLengthError, UsageError, YuanError

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
}
"""Status: the error's type."""

MAX_MESSAGE_BYTES = 1600
MAX_PARAM_BYTES = 256
"""In UTF-8, so that an error stays below 2 KiB for everybody who logs or shows it."""


class ApiError(YuanError):
    """An answer other than 200, ready to be sent."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        retry: bool = True,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        """When it is worth asking again; None where nothing is known about it."""
        self.retry = retry
        """Whether a client that asks again by itself should; OpenAI's does after some kinds of errors."""

    @property
    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "invalid_request_error")
        param = None if self.param is None else clipped(self.param, MAX_PARAM_BYTES)
        message = clipped(str(self), MAX_MESSAGE_BYTES)
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Retry-After holds whole seconds, at least one."""
        headers = {} if self.retry else {"X-Should-Retry": "false"}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        return headers


def clipped(text: str, max_bytes: int) -> str:
    """The text, or its beginning and its end with the number of characters between; half surrogates become `?`.

    The bytes are those that JSON in ASCII takes, where a character outside ASCII takes six or twelve.
    """
    if len(text) <= max_bytes and len(_escaped(text)) <= max_bytes:
        return text.encode(errors="replace").decode()
    room = max_bytes - 40
    begin, end = _beginning(text, room * 3 // 4), _beginning(text[::-1], room // 4)[::-1]
    between = len(text) - len(begin) - len(end)
    return f"{begin} ... ({between:,} characters) ... {end}".encode(errors="replace").decode()


def _beginning(text: str, max_bytes: int) -> str:
    size = 0
    for count, character in enumerate(text[:max_bytes]):
        size += len(_escaped(character))
        if size > max_bytes:
            return text[:count]
    return text[:max_bytes]


def _escaped(text: str) -> str:
    return json.dumps(text)[1:-1]


class UnavailableError(ApiError):
    """The server cannot compute now: the engine died, the queue is full, or the process is about to end."""

    def __init__(self, message: str, *, code: str, retry_after_s: float | None = None) -> None:
        super().__init__(503, message, code=code, retry_after_s=retry_after_s)


def api_error(error: Exception) -> ApiError:
    """Any error as an answer: those that a request can cause are its fault (400), everything else is ours (500)."""
    if isinstance(error, ApiError):
        return error
    # What the library calls max_new_tokens, the API calls max_tokens.
    message = str(error).replace("max_new_tokens", "max_tokens")
    if isinstance(error, ContextLengthError):
        return ApiError(400, message, code="context_length_exceeded")
    if isinstance(error, UsageError):
        return ApiError(400, message, param=_named_field(message))
    if isinstance(error, YuanError):
        return ApiError(500, message, code=type(error).__name__)
    return ApiError(500, "a bug of this server; its log has the traceback", code="internal_error")


def _named_field(message: str) -> str | None:
    """The field that a message of SamplingParams starts with: `top_p is 3; it must be ...`."""
    named = re.match(r"([a-z_]+) is ", message)
    return named[1] if named else None
