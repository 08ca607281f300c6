"""Anthropic's Messages API: answers, events of a stream, calls and counts, over the same service as the chats."""

import json
from typing import Any

import httpx
import pytest

from serving import Running, running

HELLO = {"role": "user", "content": "The quick brown fox"}
WEATHER = {
    "name": "weather",
    "input_schema": {"type": "object", "properties": {"days": {"enum": [1, 2, 3]}}, "required": ["days"]},
}


@pytest.fixture(scope="module")
def server():
    with running() as server:
        yield server


def ask(server: Running, **change: Any) -> dict[str, Any]:
    return server.post("/v1/messages", {"messages": [HELLO], "max_tokens": 8, "temperature": 0} | change).json()


def events(server: Running, **change: Any) -> list[dict[str, Any]]:
    body = {"messages": [HELLO], "max_tokens": 8, "temperature": 0, "stream": True} | change
    text = httpx.post(f"{server.url}/v1/messages", json=body, timeout=60).text
    found = []
    for block in text.strip().split("\n\n"):
        kind, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert kind == f"event: {found[-1]['type']}"
    return found


def test_an_answer_is_that_of_the_library(server: Running) -> None:
    expected = server.lm.chat([HELLO], max_new_tokens=8)
    said = ask(server)
    assert said["content"] == [{"type": "text", "text": expected.text}]
    assert (said["type"], said["role"], said["stop_reason"]) == ("message", "assistant", "max_tokens")
    assert said["usage"] == {"input_tokens": expected.prompt_tokens, "output_tokens": 8}
    stream = events(server)
    assert [event["type"] for event in stream[:2]] == ["message_start", "content_block_start"]
    assert [event["type"] for event in stream[-3:]] == ["content_block_stop", "message_delta", "message_stop"]
    text = "".join(event["delta"]["text"] for event in stream if event["type"] == "content_block_delta")
    assert text == expected.text
    assert stream[-2]["delta"]["stop_reason"] == "max_tokens"
    assert stream[-2]["usage"]["output_tokens"] == 8


def test_calls_are_blocks(server: Running) -> None:
    forced = {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "weather"}, "max_tokens": 120}
    said = ask(server, **forced)
    (block,) = said["content"]
    assert (block["type"], block["name"], said["stop_reason"]) == ("tool_use", "weather", "tool_use")
    assert block["input"]["days"] in (1, 2, 3)
    stream = events(server, **forced)
    written = "".join(event["delta"]["partial_json"] for event in stream if event["type"] == "content_block_delta")
    assert json.loads(written) == block["input"]
    turns = [
        HELLO,
        {"role": "assistant", "content": said["content"]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": block["id"], "content": "rain"}]},
    ]
    assert ask(server, messages=turns, tools=[WEATHER], system="Be brief.")["type"] == "message"


def test_counts_are_those_of_the_prompt(server: Running) -> None:
    count = server.post("/v1/messages/count_tokens", {"messages": [HELLO], "system": "Be brief."}).json()
    assert count["input_tokens"] == ask(server, system=[{"type": "text", "text": "Be brief."}])["usage"]["input_tokens"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "of type 'image'"),
        ({"messages": []}, "messages: list should have at least 1 item"),
        ({"tools": [WEATHER | {"name": "a b"}]}, "string should match"),
        ({"model": "claude"}, "the model 'claude' is not here"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, "none of the tools"),
    ],
)
def test_what_cannot_be_done_is_said(server: Running, change: dict[str, Any], complaint: str) -> None:
    assert complaint in ask(server, **change)["error"]["message"]
