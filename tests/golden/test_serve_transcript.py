"""What the API says, word by word: requests and responses as they go over the wire.

Grammars hold the small random model to one answer, so that nothing depends on its numbers; identifiers and times are
replaced, and pieces of a stream that come one after the other are put together.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from serving import Running, running

TRANSCRIPT = Path(__file__).with_name("serve_transcript.json")


@pytest.fixture(scope="module")
def server():
    with running() as server:
        yield server


@pytest.mark.parametrize("exchange", json.loads(TRANSCRIPT.read_text()), ids=lambda exchange: exchange["name"])
def test_transcript(server: Running, exchange: dict[str, Any]) -> None:
    assert answer(server, exchange["request"]) == exchange["response"]


def answer(server: Running, request: dict[str, Any]) -> dict[str, Any]:
    path = request["path"]
    got = server.post(path, request["body"]) if "body" in request else server.get(path)
    if got.headers["content-type"].startswith("text/event-stream"):
        return {"status": got.status_code, "events": joined([line[6:] for line in got.text.split("\n\n") if line])}
    return {"status": got.status_code, "body": settled(got.json())}


def joined(events: list[str]) -> list[Any]:
    """Events with those that only add text, or arguments of the same call, put together."""
    parts: list[Any] = []
    for data in events:
        part = data if data == "[DONE]" else settled(json.loads(data))
        if parts and calls(part) and calls(parts[-1]) and "id" not in calls(part)[0]:
            calls(parts[-1])[-1]["function"]["arguments"] += calls(part)[0]["function"]["arguments"]
        elif parts and adds_text(part) and adds_text(parts[-1]):
            add(parts[-1]["choices"][0], part["choices"][0])
        else:
            parts.append(part)
    return parts


def calls(event: Any) -> list[dict[str, Any]]:
    """What a chunk says of calls; their arguments come in as many pieces as time has it."""
    if event == "[DONE]" or not event["choices"] or "delta" not in event["choices"][0]:
        return []
    return event["choices"][0]["delta"].get("tool_calls", [])


def adds_text(event: Any) -> bool:
    if event == "[DONE]" or not event["choices"]:
        return False
    choice = event["choices"][0]
    return "text" in choice or list(choice["delta"]) == ["content"]


def add(choice: dict[str, Any], later: dict[str, Any]) -> None:
    if "text" in choice:
        choice["text"] += later["text"]
    else:
        choice["delta"]["content"] += later["delta"]["content"]
    choice["finish_reason"] = later["finish_reason"]


def settled(value: Any) -> Any:
    """Without what is different each time."""
    if isinstance(value, dict):
        return {key: "(a time)" if key == "created" else settled(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [settled(inner) for inner in value]
    if isinstance(value, str):
        return re.sub(r"^(chatcmpl-|cmpl-|call_|fp_)[0-9a-f]{10,24}$", r"\1(an id)", value)
    return value
