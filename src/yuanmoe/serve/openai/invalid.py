"""What pydantic found wrong with a body, as one error that names the field.

Not here: the shape of errors (`http.errors`), and what is refused before validation (`http.json_body`).
"""

from collections.abc import Iterable, Sequence
from typing import Any

from yuanmoe.hints import closest
from yuanmoe.http.errors import MAX_PARAM_BYTES, ApiError, clipped

MAX_NAME = 64
"""Characters of an unknown field that a suggestion looks at."""


def invalid_body(errors: Sequence[Any], body: Any, fields: Iterable[str] = ()) -> ApiError:
    """What pydantic found, as one error that names the field; `fields` are those a misspelt name may have meant."""
    # Of the branches of a union, the one that got furthest is what was meant.
    first = max(errors, key=lambda error: len(_path(error, body)))
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
    close = closest(name[:MAX_NAME], fields)
    meant = "leave it out" if close is None else f"did you mean {close!r}?"
    return f"unknown field {clipped(param, MAX_PARAM_BYTES)!r}; {meant}"
