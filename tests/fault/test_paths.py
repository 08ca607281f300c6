"""Paths and methods as clients try them: 404 for what is not there, 405 for another method, HEAD as GET."""

import httpx
import pytest

from serving import Running, running
from yuanmoe.serve.openai.app import Access

ORIGIN = "http://app.example"
ASKS = {"prompt": "a", "max_tokens": 1}


@pytest.fixture(scope="module")
def server():
    with running(access=Access(cors_origins=[ORIGIN])) as server:
        yield server


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/small", "/v1/info", "/metrics", "/"])
def test_head_is_get_without_a_body(server: Running, path: str) -> None:
    answer = httpx.head(server.url + path)
    assert (answer.status_code, answer.content) == (200, b"")
    assert int(answer.headers["content-length"]) > 0


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("HEAD", "/v1/completions", 405),
        ("DELETE", "/health", 405),
        ("POST", "/", 405),
        ("POST", "/v1/nothing", 404),
        ("POST", "/chat/completions", 404),
        ("PUT", "/nothing", 404),
        ("GET", "/nothing", 404),
        ("GET", "/%00", 404),
        ("GET", "/" + "a" * 5000, 404),
        ("GET", "/..%2f..%2fcore/gate.py", 404),
        ("GET", "/v1/models/", 200),
    ],
)
def test_unknown_paths_and_wrong_methods(server: Running, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, server.url + path)
    assert answer.status_code == status
    assert status != 405 or answer.headers["allow"]
    assert method == "HEAD" or status == 200 or len(answer.json()["error"]["message"]) < 500


@pytest.mark.parametrize("path", ["//v1/completions", "/v1/completions/", "/v1//completions"])
def test_slashes_too_many(server: Running, path: str) -> None:
    assert httpx.post(server.url + path, json=ASKS, timeout=20).status_code == 200


def test_browsers_with_openai_s_client(server: Running) -> None:
    wanted = "authorization,content-type,x-stainless-lang,x-stainless-os,x-stainless-retry-count"
    headers = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": wanted}
    answer = httpx.options(f"{server.url}/v1/chat/completions", headers=headers)
    assert answer.status_code == 200
    assert set(wanted.split(",")) <= set(answer.headers["access-control-allow-headers"].split(","))


def test_log_probabilities_end_with_the_text(server: Running) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "guided_regex": "alpha beta gamma delta", "logprobs": True}
    for stop in ("beta", "a b"):
        choice = server.post("/v1/chat/completions", body | {"stop": stop}).json()["choices"][0]
        assert choice["finish_reason"] == "stop"
        text = "".join(token["token"] for token in choice["logprobs"]["content"])
        assert text == choice["message"]["content"] == "alpha beta".partition(stop)[0]
