"""The benchmark of standstills against a small server: every body is refused or answered, none by a fault of ours."""

import os

from serving import running
from yuanmoe.bench.standstill import FIELDS, measure_standstill


def test_every_route_gets_hostile_bodies_and_the_stream_goes_on() -> None:
    with running() as server:
        found = measure_standstill(server.url, max_body_bytes=2**18, pid=os.getpid())
    assert found["server_errors"] == 0
    assert {row["route"] for row in found["bodies"]} == set(FIELDS)
    assert all(row["status"] == 200 or row["answer_bytes"] <= 2048 for row in found["bodies"])
    assert found["longest_standstill_s"] > 0
    assert found["memory_growth_bytes"] is not None
