"""What one client waits for: nothing that came before an error is lost by it."""

import asyncio

import pytest

from yuanmoe.engine.requests import RequestOutput
from yuanmoe.serve.core.job import Job


def test_an_error_comes_after_the_tokens_before_it():
    async def read():
        job = Job(lambda request_id, reason: None)
        job.accepted([7])
        first = RequestOutput(7, 3, -0.5)
        job.take(0, first)
        job.take(0, RequestOutput(7, -1, 0.0, error=ValueError("the pass failed")))
        assert await job.outputs() == [(0, first)]
        with pytest.raises(ValueError, match="the pass failed"):
            await job.outputs()
        assert job.closed

    asyncio.run(asyncio.wait_for(read(), 10))
