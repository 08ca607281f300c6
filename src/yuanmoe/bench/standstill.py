"""How long a neighbour's stream stands still while others send the worst bodies to every route.

A client of a server that runs: one connection streams an answer, another posts hostile bodies, one after the other. The
longest gap between two pieces of the stream is the standstill; what the stream does alone is measured first.
Not here: the server, and HTTP libraries; the standard library's client is enough.
"""

import argparse
import http.client
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

FIELDS = {
    "/v1/chat/completions": "messages",
    "/v1/completions": "prompt",
    "/tokenize": "messages",
    "/detokenize": "tokens",
}
JSON = {"Content-Type": "application/json"}
QUIET_S = 2.0
"""How long the stream is watched alone."""
ANSWER_S = 120.0
"""How long one answer may take before the measurement gives up."""


def hostile_bodies(max_bytes: int) -> Iterator[tuple[str, str, bytes]]:
    """Kind, route and body of at most `max_bytes` each."""
    room = max_bytes - 256
    shapes = {
        "empty objects": b"[" + b"{}," * (room // 3 - 1) + b"1]",
        "numbers": b"[" + b"1," * (room // 2 - 1) + b"1]",
        "texts": b"[" + b'"a",' * (room // 4 - 1) + b'"a"]',
        "numbers within the bound": b"[" + b"1," * min(room // 2 - 1, 99_000) + b"1]",
        "depth": b"[" * room,
        "a long text": b'"' + b"1" * room + b'"',
        "escapes": b'"' + b"\\n" * (room // 2) + b'"',
        "backslashes": b'"' + b"\\" * room,
    }
    for route, field in FIELDS.items():
        for kind, value in shapes.items():
            yield kind, route, b'{"%s": %s}' % (field.encode(), value)
    many = max_bytes // 16
    grammars: dict[str, dict[str, Any]] = {
        "a large enum": {"response_format": _schema({"enum": [f"value {place}" for place in range(many)]})},
        "a large union": {"response_format": _schema({"anyOf": [{"const": place} for place in range(many // 2)]})},
        "a long grammar": {"guided_grammar": "start: " + " | ".join(f'"a{place}"' for place in range(many))},
        "a costly regex": {"guided_regex": "(a{1000}){1000}"},
    }
    for kind, fields in grammars.items():
        body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1} | fields
        yield kind, "/v1/chat/completions", json.dumps(body).encode()[:max_bytes]


def measure_standstill(url: str, *, max_body_bytes: int = 4 * 2**20, pid: int | None = None) -> dict[str, Any]:
    """The longest gap of a stream, alone and under each hostile body, in seconds; with `pid`, growth of its memory."""
    stream = _Stream(url)
    stream.start()
    time.sleep(QUIET_S)
    alone, before = stream.longest_gap(), _resident_bytes(pid)
    rows, peak = [], before
    for kind, route, body in hostile_bodies(max_body_bytes):
        stream.longest_gap()
        started = time.monotonic()
        status, size = _post(url, route, body)
        rows.append(
            {
                "kind": kind,
                "route": route,
                "status": status,
                "answer_bytes": size,
                "took_s": time.monotonic() - started,
                "standstill_s": stream.longest_gap(),
            }
        )
        peak = max(peak, _resident_bytes(pid))
    stream.stop()
    return {
        "alone_s": alone,
        "longest_standstill_s": max(row["standstill_s"] for row in rows),
        "memory_growth_bytes": None if pid is None else peak - before,
        "server_errors": sum(row["status"] >= 500 for row in rows),
        "bodies": rows,
    }


class _Stream(threading.Thread):
    """A client that asks for one answer after the other and looks at the time between pieces."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._longest = 0.0
        self._last: float | None = None
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.is_set():
            self._last = None
            connection = _connect(self._url)
            body = {"prompt": "def add(", "max_tokens": 500, "stream": True, "logit_bias": {"0": -100}}
            connection.request("POST", "/v1/completions", json.dumps(body), JSON)
            response = connection.getresponse()
            while response.readline() and not self._ended.is_set():
                now = time.monotonic()
                self._longest = max(self._longest, now - (self._last or now))
                self._last = now
            connection.close()

    def longest_gap(self) -> float:
        """Since the last call, the gap that is not over yet included."""
        last = self._last
        longest = max(self._longest, 0.0 if last is None else time.monotonic() - last)
        self._longest = 0.0
        return longest

    def stop(self) -> None:
        self._ended.set()
        self.join(ANSWER_S)


def _post(url: str, route: str, body: bytes) -> tuple[int, int]:
    connection = _connect(url)
    try:
        connection.request("POST", route, body, JSON)
        response = connection.getresponse()
        return response.status, len(response.read())
    finally:
        connection.close()


def _connect(url: str) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    return http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port, timeout=ANSWER_S)


def _schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


def _resident_bytes(pid: int | None) -> int:
    """Memory that a process holds, where the system says so (Linux)."""
    status = Path(f"/proc/{pid}/status")
    if pid is None or not status.is_file():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def print_standstill() -> None:
    """Measures a server that runs, and writes JSON."""
    parser = argparse.ArgumentParser(description="How long a stream stands still under hostile bodies.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--pid", type=int, default=None, help="Process of the server, for its memory.")
    parser.add_argument("--max-body-bytes", type=int, default=4 * 2**20)
    given = parser.parse_args()
    print(json.dumps(measure_standstill(given.url, max_body_bytes=given.max_body_bytes, pid=given.pid), indent=1))


if __name__ == "__main__":
    print_standstill()
