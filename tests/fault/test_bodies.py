"""Bodies of strangers: whatever they hold, they are refused at little cost, in few words, and never as our fault."""

import contextlib
import json
import tracemalloc

import pytest

from serving import Running, running
from small_tokenizers import bpe
from yuanmoe.http.errors import ApiError, clipped
from yuanmoe.http.json_body import MAX_CONTAINERS, MAX_DEPTH, MAX_KEYS, MAX_VALUES, parse_json

ROUTES = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]
MIB = 2**20
FIELDS = {
    "/v1/chat/completions": b"messages",
    "/v1/completions": b"prompt",
    "/tokenize": b"messages",
    "/detokenize": b"tokens",
}

VALUES = {
    "empty objects": b"[" + b"{}," * MIB + b"1]",
    "some empty objects": b"[" + b"{}," * 5000 + b"1]",
    "short texts": b"[" + b'"a",' * MIB + b'"a"]',
    "some short texts": b"[" + b'"a",' * 50_000 + b'"a"]',
    "numbers": b"[" + b"1," * (2 * MIB - 100) + b"1]",
    "some numbers": b"[" + b"-1," * 50_000 + b"1]",
    "lists of lists": b"[" + b"[[[]]]," * 400_000 + b"1]",
    "deep": b"[" * 4_000_000,
    "deep objects": b'{"a":' * 800_000,
    "closes only": b"]" * 4_000_000,
    "a long text": b'"' + b"a" * 4_000_000 + b'"',
    "escapes": b'"' + b"\\n" * 2_000_000 + b'"',
    "backslashes": b'"' + b"\\" * 4_000_000 + b'"',
    "one quote and backslashes": b'"' + b"\\" * 3_999_999,
    "quotes": b'"' * 4_000_000,
    "digits": b"9" * 4_000_000,
    "4,300 digits": b"9" * 4_300,
    "a large number": b"1e400",
    "not a number": b"NaN",
    "infinite": b"[-Infinity]",
    "half a surrogate": b'"\\ud800"',
    "null bytes": b'"\\u0000"' + b"\0" * 9,
    "keys": b"{" + b",".join(b'"k%d":1' % place for place in range(90_000)) + b"}",
    "some keys": b"{" + b",".join(b'"k%d":1' % place for place in range(1000)) + b"}",
    "one long key": b'{"' + b"k" * 4_000_000 + b'":1}',
    "the same key": b"{" + b'"k":1,' * 50_000 + b'"k":1}',
    "no UTF-8": b'"' + b"\xff" * 4_000_000 + b'"',
}


@pytest.fixture(scope="module")
def server():
    with running() as server:
        yield server


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("route", ROUTES)
def test_no_body_is_the_server_s_fault_and_errors_are_short(server: Running, route: str, name: str) -> None:
    for body in (b'{"%s": %s}' % (FIELDS[route], VALUES[name]), b'{"field": 1}', VALUES[name]):
        answer = server.post(route, None, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 413) or (answer.status_code == 200 and name.startswith("4,300")), name
        assert len(answer.content) <= 2048
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("name", VALUES)
def test_a_body_is_refused_before_it_takes_memory(name: str) -> None:
    tracemalloc.start()
    try:
        with contextlib.suppress(ApiError):
            parse_json(VALUES[name])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 * MIB


def test_bounds_are_those_that_are_said() -> None:
    assert len(parse_json(b"[" + b"1," * (MAX_VALUES - 1) + b"1]")) == MAX_VALUES
    with pytest.raises(ApiError, match="more than 100,000 values"):
        parse_json(b"[" + b"1," * MAX_VALUES + b"1]")
    assert len(parse_json(b"[" + b"1," * MAX_VALUES + b"1]", 2 * MAX_VALUES)) == MAX_VALUES + 1
    assert len(parse_json(b"[" + b"[]," * (MAX_CONTAINERS - 2) + b"[]]")) == MAX_CONTAINERS - 1
    with pytest.raises(ApiError, match="more than 20,000 lists and objects"):
        parse_json(b"[" + b"[]," * MAX_CONTAINERS + b"[]]")
    assert parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    with pytest.raises(ApiError, match="more than 100 deep"):
        parse_json(b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1))
    with pytest.raises(ApiError, match="1,025 keys, the limit is 1,024"):
        parse_json(json.dumps([{str(place): 1 for place in range(MAX_KEYS + 1)}]).encode())


@pytest.mark.parametrize("before", range(5))
def test_what_stands_in_texts_is_not_counted(before: int) -> None:
    """Brackets, commas and escaped quotes, at every place of the pieces that are counted at once."""
    text = "\\" * before + '"' + '[{,"\\' * 150_000
    assert parse_json(json.dumps({"a": text}).encode()) == {"a": text}


def test_long_texts_are_clipped_in_the_middle() -> None:
    for text in ("a" * 9999, "\u6625" * 9999, "\U0001f600" * 9999, "\ud800" * 9999):
        short = clipped(text, 1600)
        assert len(json.dumps(short)) <= 1640
        assert "characters) ..." in short
        json.dumps(short).encode()
    assert clipped("short", 1600) == "short"
    assert clipped("half \ud800", 1600) == "half ?"


def chat(**fields: object) -> dict:
    return {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1} | fields


def schema(value: object) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": value}}


def call(arguments: str) -> list:
    function = {"name": "f", "arguments": arguments}
    return [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": function}]},
        {"role": "user", "content": "a"},
    ]


HOSTILE_CHATS = {
    "a large enum": chat(response_format=schema({"enum": [f"value {place}" for place in range(20_000)]})),
    "a long constant": chat(response_format=schema({"const": "a" * 1_000_000})),
    "an infinite constant": b'{"messages":[{"role":"user","content":"a"}],"response_format":{"type":"json_schema",'
    b'"json_schema":{"name":"a","schema":{"const":1e999}}}}',
    "a long regex": chat(guided_regex="ab|" * 100_000),
    "a deep regex": chat(guided_regex="(" * 100_000),
    "a deep grammar": chat(guided_grammar="start: " + "(" * 100_000),
    "a long grammar": chat(guided_grammar="start: " + " | ".join(f'"a{place}"' for place in range(20_000))),
    "deep arguments": chat(messages=call("[" * 1_000_000)),
    "many arguments": chat(messages=call("[" + "{}," * 300_000 + "1]")),
    "arguments of digits": chat(messages=call("9" * 1_000_000)),
    "a long stop": chat(stop="a" * 1_000_000),
    "many stops": chat(stop=["a"] * 50_000),
    "many biases": chat(logit_bias={str(place): 1 for place in range(1025)}),
    "a long bias": chat(logit_bias={"1" * 1_000_000: 1}),
    "a long model": chat(model="m" * 1_000_000),
    "a long role": chat(messages=[{"role": "r" * 1_000_000, "content": "a"}]),
    "a long tool": chat(tools=[{"type": "function", "function": {"name": "f" * 1_000_000}}]),
    "a prompt that cannot fit": chat(messages=[{"role": "user", "content": "1" * 3_900_000}]),
    "many messages": chat(messages=[{"role": "user", "content": "a"}] * 4097),
}


@pytest.mark.parametrize("name", HOSTILE_CHATS)
def test_chats_that_cost_too_much(server: Running, name: str) -> None:
    body = HOSTILE_CHATS[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = server.post("/v1/chat/completions", None, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 404), answer.text[:300]
    assert len(answer.content) <= 2048


def test_a_prompt_that_cannot_fit_is_not_read(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(server.service.tokenizer), "_encode_ordinary", None)
    for route, body in {
        "/v1/completions": {"prompt": "a" * 1_000_000},
        "/v1/chat/completions": chat(messages=[{"role": "user", "content": "a" * 1_000_000}]),
        "/tokenize": {"prompt": "a" * 1_000_000},
    }.items():
        answer = server.post(route, body)
        assert answer.status_code == 400
        assert "the prompt has 1,000,000 characters" in answer.json()["error"]["message"]


def test_long_texts_leave_the_lock_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """`encode` of the library would keep it until the end, `encode_batch` does not."""
    tokenizer = bpe()
    calls: list[int] = []

    class Backend:
        def encode_batch(self, texts: list[str], **options: bool) -> list:
            calls.append(len(texts))
            return tokenizer_backend.encode_batch(texts, **options)

    tokenizer_backend = tokenizer._backend
    monkeypatch.setattr(tokenizer, "_backend", Backend())
    assert tokenizer.decode(tokenizer.encode("a b <sep> c")) == "a b <sep> c"
    assert calls
