"""A server among clients that leave, ask too much, or lie, and over an engine that dies: it never hangs or leaks."""

import json
import re
import socket

import httpx
import pytest

from serving import LONG, Running, running, slow_engine
from small_lm import small_lm
from yuanmoe.serve.core.keys import ApiKeys, Client, entry_line, read_keys
from yuanmoe.serve.openai.app import Access

SHORT = {"prompt": "def add(", "max_tokens": 2}


@pytest.fixture(scope="module")
def server():
    """Steps take 20 ms, so that there is time to be in the middle of something."""
    with running(slow_engine(small_lm(max_position_embeddings=1024))) as server:
        yield server


def begin(server: Running, body: dict) -> socket.socket:
    """A connection that has sent a request."""
    port = int(server.url.rsplit(":", 1)[1])
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def at_rest(server: Running) -> bool:
    return (server.stats.running, server.stats.queued, server.stats.used_pages, server.service.worker.load) == (0,) * 4


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_is_forgotten_within_a_step(server: Running, stream: bool) -> None:
    connection = begin(server, LONG | {"stream": stream, "n": 2})
    if stream:
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    assert server.wait(lambda: server.stats.running == 2)
    connection.close()
    assert server.wait(lambda: server.service.worker.load == 0, 1)
    steps = server.service.worker._engine.stats().steps
    assert server.wait(lambda: at_rest(server))
    assert server.stats.steps <= steps + 1


def test_who_leaves_while_waiting_is_forgotten_too(server: Running) -> None:
    connections = [begin(server, LONG | {"n": 16}) for _ in range(5)]
    assert server.wait(lambda: server.stats.queued > 0)
    for connection in connections:
        connection.close()
    assert server.wait(lambda: at_rest(server))


def test_a_stop_string_ends_the_sequence_in_the_engine(server: Running) -> None:
    first = server.post("/v1/completions", LONG | {"max_tokens": 4, "temperature": 0}).json()["choices"][0]["text"]
    answer = server.post("/v1/completions", LONG | {"temperature": 0, "stop": first[:1]}).json()
    assert answer["choices"][0] == {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}
    assert at_rest(server) or server.wait(lambda: at_rest(server), 1)


def test_first_tokens_and_ends_wait_for_no_burst(server: Running, monkeypatch) -> None:
    monkeypatch.setattr("yuanmoe.serve.core.worker.WAKE_S", 3600)
    # With log-probabilities a first token says something even if its text is half a character.
    body = LONG | {"stream": True, "logprobs": 0}
    for _ in range(2):  # the first may come to a server that woke nobody for long
        assert server.post("/v1/completions", SHORT | {"max_tokens": 4}).status_code == 200
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=10) as stream:
            assert next(stream.iter_lines()).startswith("data: {")
    worker = server.service.worker
    worker._loop.call_soon_threadsafe(worker._wake)
    assert server.wait(lambda: at_rest(server))


def test_an_engine_that_dies_tells_everybody_and_nobody_waits() -> None:
    engine = slow_engine(small_lm(max_position_embeddings=1024))
    with running(engine) as server, httpx.Client(base_url=server.url, timeout=10) as client:
        assert client.get("/health").json() == {"status": "ok"}
        waiting = begin(server, LONG)
        with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: {")
            engine.dies = True
            *_, last = [line for line in lines if line]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["code"] == "engine_dead"
        assert error["message"] == "the engine has died (MemoryError('the engine was told to die')); restart the server"
        assert waiting.recv(1000).startswith(b"HTTP/1.1 503")
        waiting.close()
        for answer in (client.get("/health"), client.post("/v1/completions", json=SHORT)):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")
        assert "yuanmoe_up 0.0" in client.get("/metrics").text


def test_a_full_queue_asks_to_come_back() -> None:
    with running(slow_engine(small_lm(max_position_embeddings=1024)), max_batch_size=1, max_queue=1) as server:
        first = begin(server, LONG | {"n": 2})
        assert server.wait(lambda: server.service.worker.load == 2)
        answer = server.post("/v1/completions", SHORT)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        assert answer.json()["error"] == {
            "message": "2 sequences are inside or wait, 1 more would exceed the 2 that this server takes; "
            "ask again in a moment",
            "type": "overloaded_error",
            "param": None,
            "code": "queue_full",
        }
        first.close()
        assert server.wait(lambda: server.service.worker.load == 0)
        assert server.post("/v1/completions", SHORT).status_code == 200


def test_answers_take_a_bounded_time() -> None:
    with running(slow_engine(small_lm(max_position_embeddings=1024)), timeout_s=0.3) as server:
        answer = server.post("/v1/completions", LONG)
        assert (answer.status_code, answer.json()["error"]["code"]) == (408, "timeout")
        assert "not finished within 0.3 s, the limit of this server; ask for fewer tokens" in answer.text
        assert answer.headers["X-Should-Retry"] == "false"
        events = server.post("/v1/completions", LONG | {"stream": True}).text.split("\n\n")
        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "timeout"
        assert server.wait(lambda: at_rest(server))


KEY, OTHER = "yuan-one", "yuan-other"


def keyed(tmp_path, **limits) -> ApiKeys:
    file = tmp_path / "keys"
    file.write_text(f"# teams\n{entry_line('team-a', KEY, **limits)}\n\n{entry_line('team-b', OTHER)} # the others\n")
    return read_keys(file, None)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_keys(tmp_path) -> None:
    with running(access=Access(keys=keyed(tmp_path))) as server:
        for path in ("/v1/models", "/v1/info", "/metrics", "/v1/routing/stats"):
            assert server.get(path).status_code == 401
            assert server.get(path, headers=bearer(KEY)).status_code == 200
        stranger = server.post("/v1/completions", SHORT)
        assert stranger.json()["error"]["message"] == "no API key; send it as `Authorization: Bearer KEY`"
        assert stranger.json()["error"]["type"] == "authentication_error"
        wrong = server.post("/tokenize", {"prompt": "a"}, headers=bearer("yuan-on"))
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_api_key")
        assert server.post("/v1/completions", SHORT, headers=bearer(OTHER)).status_code == 200
        assert server.get("/health").status_code == server.get("/").status_code == 200


def test_rates_and_numbers_at_once_are_each_key_s_own(tmp_path) -> None:
    keys = keyed(tmp_path, requests_per_minute=2, concurrency=1)
    engine = slow_engine(small_lm(max_position_embeddings=1024))
    with running(engine, access=Access(keys=keys)) as server, httpx.Client(base_url=server.url) as client:
        options = {"json": LONG | {"stream": True}, "headers": bearer(KEY)}
        with client.stream("POST", "/v1/completions", **options) as first:
            assert first.status_code == 200
            second = server.post("/v1/completions", SHORT, headers=bearer(KEY))
            assert (second.status_code, second.json()["error"]["code"]) == (429, "too_many_at_once")
            assert "team-a has 1 requests under way, its limit is 1 at once" in second.text
        assert server.wait(lambda: at_rest(server))
        assert server.post("/v1/completions", SHORT, headers=bearer(KEY)).status_code == 200
        third = server.post("/v1/completions", SHORT, headers=bearer(KEY))
        assert (third.status_code, third.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert "team-a has used up its 2 requests a minute" in third.text
        assert 20 <= int(third.headers["Retry-After"]) <= 30
        assert server.post("/v1/completions", SHORT, headers=bearer(OTHER)).status_code == 200


def test_without_keys_the_limits_are_everybody_s() -> None:
    access = Access(anyone=Client(name="anyone", requests_per_minute=1))
    with running(access=access) as server:
        assert server.post("/tokenize", {"prompt": "a"}).status_code == 200
        assert server.post("/tokenize", {"prompt": "a"}).status_code == 429
        assert server.get("/v1/models").status_code == 200


def test_bodies_are_bounded_in_size_and_time() -> None:
    with running(access=Access(max_body_bytes=1000, body_timeout_s=0.2)) as server:
        large = server.post("/v1/completions", {"prompt": "a" * 1000})
        assert (large.status_code, large.json()["error"]["type"]) == (413, "invalid_request_error")
        assert "larger than the 1,000 bytes that this server takes (--max-body)" in large.text
        pieces = (b" " * 400 for _ in range(5))
        headers = {"Content-Type": "application/json"}
        chunked = httpx.post(f"{server.url}/v1/completions", content=pieces, headers=headers)
        assert chunked.status_code == 413
        port = int(server.url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(4000)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"the body did not arrive within 0.2 s" in answer


def test_other_sites_may_not_ask_unless_they_are_named() -> None:
    ask = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    with running() as server:
        silent = httpx.options(f"{server.url}/v1/completions", headers=ask)
        assert silent.status_code == 405
        assert not [name for name in silent.headers if name.startswith("access-control")]
        assert "access-control-allow-origin" not in server.get("/v1/models", headers=ask).headers
        # A page can send text without asking; it is no JSON here.
        text = httpx.post(
            f"{server.url}/v1/completions", content=json.dumps(SHORT), headers={"Content-Type": "text/plain"}
        )
        assert text.status_code == 400
        assert "sent as application/json" in text.text
        # Nor can a name that it made to point here.
        rebound = server.get("/v1/models", headers={"Host": "elsewhere.example:8000"})
        assert (rebound.status_code, rebound.json()["error"]["code"]) == (403, "unknown_host")
        for host in ("localhost", "LOCALHOST:1", "127.0.0.1:80", "[::1]:8000", "127.1.2.3"):
            assert server.get("/v1/models", headers={"Host": host}).status_code == 200
        for host in ("localhost.elsewhere.example", "8.8.8.8:80", "127.0.0.1.elsewhere.example", ":80"):
            assert server.get("/v1/models", headers={"Host": host}).status_code == 403
    with running(access=Access(cors_origins=["https://elsewhere.example"])) as server:
        allowed = httpx.options(f"{server.url}/v1/completions", headers=ask)
        assert allowed.headers["access-control-allow-origin"] == "https://elsewhere.example"
        other = server.get("/v1/models", headers={"Origin": "https://third.example"})
        assert "access-control-allow-origin" not in other.headers


HOSTILE = {
    "nothing": b"",
    "half": b'{"prompt": "a',
    "no UTF-8": b'{"prompt": "\xff"}',
    "deep": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep schema": b'{"prompt": "a", "max_tokens": 1, "guided_grammar": "start: ' + b"(" * 50_000 + b'"}',
    "long number": b'{"prompt": "a", "max_tokens": ' + b"9" * 10_000 + b"}",
    "large number": b'{"prompt": "a", "seed": 1e400}',
    "not a number": b'{"prompt": "a", "temperature": NaN}',
    "infinite": b'{"prompt": "a", "logit_bias": {"1": -Infinity}}',
    "lone surrogate": b'{"prompt": "\\ud800"}',
    "surrogate field": b'{"prompt": "a", "\\udfff": 1}',
    "token ids that are none": b'{"prompt": [1, 99999999999]}',
    "negative ids": b'{"prompt": [-1]}',
    "mixed prompts": b'{"prompt": ["a", 1]}',
    "bias on nobody": b'{"prompt": "a", "logit_bias": {"999999": 1}}',
    "bias by name": b'{"prompt": "a", "logit_bias": {"the": 1}}',
    "wrong grammar": b'{"prompt": "a", "guided_grammar": "start: nobody"}',
    "wrong regex": b'{"prompt": "a", "guided_regex": "(a"}',
    "two grammars": b'{"prompt": "a", "guided_regex": "a", "guided_grammar": "start: \\"a\\""}',
    "an empty stop": b'{"prompt": "a", "stop": ""}',
    "best of": b'{"prompt": "a", "best_of": 3}',
    "too many": b'{"prompt": ["a", "b", "c"], "n": 16}',
    "no stream": b'{"prompt": "a", "stream_options": {"include_usage": true}}',
    "nothing to say": b'{"prompt": "a", "max_tokens": 0}',
    "suffix of ids": b'{"prompt": [5], "suffix": "a"}',
    "suffix and echo": b'{"prompt": "a", "suffix": "a", "echo": true}',
    "a null byte in a field": b'{"prompt": "a", "x\\u0000": null}',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bodies_get_an_error_with_words(server: Running, name: str) -> None:
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/completions", content=HOSTILE[name], headers=headers, timeout=20)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) > 10


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"messages": []}, "messages: list should have at least 1 item"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0: .*'robot'"),
        ({"messages": [{"role": "user"}]}, "messages.0.content: field required"),
        (
            {"messages": [{"role": "user", "content": 3}]},
            "messages.0.content: input should be a valid string, or: .*list",
        ),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "the last message must be from 'user'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type: .*'text'"),
        ({"temperature": "hot"}, "temperature: input should be a valid number"),
        ({"temperature": 101}, r"temperature is 101.0; it must be between 0 \(greedy\) and 100"),
        ({"n": 17}, "n: input should be less than or equal to 16"),
        ({"top_logprobs": 2}, "top_logprobs is 2, which needs logprobs to be true"),
        (
            {"max_tokens": 1, "max_completion_tokens": 2},
            "max_tokens is 1 and max_completion_tokens 2, which say the same",
        ),
        ({"tool_choice": "required"}, "tool_choice needs tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name: string should match"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f"}}],
                "tool_choice": {"type": "function", "function": {"name": "g"}},
            },
            "tool_choice names 'g', which is none of the tools: f",
        ),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 2}, "2 functions with 1 names"),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}], "guided_regex": "a"},
            "guided_regex and tools exclude each other",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "objet"}}}},
            "the grammar cannot be followed: .*objet",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{"}}],
                    },
                    {"role": "tool", "tool_call_id": "c", "content": "x"},
                ]
            },
            "the arguments of tool call 'c' are no JSON",
        ),
        ({"stop": [""]}, "the stop string is empty"),
        ({"stop": ["a", ""]}, "stop string 1 is empty"),
        ({"audio": {}}, "audio is {}; this server does not do that"),
    ],
)
def test_chats_that_make_no_sense(server: Running, change: dict, complaint: str) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 2} | change
    answer = server.post("/v1/chat/completions", body)
    assert answer.status_code == 400
    assert re.search(complaint, answer.json()["error"]["message"]), answer.text


def test_after_all_this_nothing_is_left(server: Running) -> None:
    assert server.wait(lambda: at_rest(server), 5)
    assert server.post("/v1/completions", SHORT).status_code == 200
