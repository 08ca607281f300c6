"""What went wrong, in the shape that OpenAI clients read: one place that turns any error into a status and a body.

Source: the error object of the OpenAI API, `{"error": {"message", "type", "param", "code"}}`.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from yuanmoe.errors import ContextLengthError, UsageError, YuanError
from yuanmoe.hints import closest

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
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Retry-After holds whole seconds, at least one."""
        headers = {} if self.retry else {"X-Should-Retry": "false"}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        return headers


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


def invalid_body(errors: Sequence[Any], body: Any, fields: Iterable[str] = ()) -> ApiError:
    """What pydantic found, as one error that names the field; `fields` are those a misspelt name may have meant."""
    # Of the branches of a union, the one that got furthest is what was meant.
    first = max(errors, key=lambda error: len(_path(error, body)))
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    path = _path(first, body)
    param = ".".join(map(str, path)) or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, _unknown_field(str(param), str(path[-1]), fields), param=param, code="unknown_field")
    same = [error["msg"] for error in errors if _path(error, body) == path]
    wanted = ", or: ".join(dict.fromkeys(message[:1].lower() + message[1:] for message in same))
    if param is None:
        return ApiError(400, f"the body must be a JSON object, sent as application/json: {wanted}")
    return ApiError(400, f"{param}: {wanted}", param=param)


def _path(error: Any, body: Any) -> tuple[str | int, ...]:
    """Where in the body an error lies; pydantic's own names for the branches of a union are left out."""
    path: list[str | int] = []
    place = body
    steps = [step for step in error["loc"] if step != "body"]
    for step in steps:
        inside = isinstance(place, dict) and step in place
        if inside or (isinstance(place, list) and isinstance(step, int) and step < len(place)):
            path.append(step)
            place = place[step]
    if error["type"] == "missing" and steps:
        path.append(steps[-1])
    return tuple(path)


def _unknown_field(param: str, name: str, fields: Iterable[str]) -> str:
    close = closest(name, fields)
    return f"unknown field {param!r}; " + ("leave it out" if close is None else f"did you mean {close!r}?")
