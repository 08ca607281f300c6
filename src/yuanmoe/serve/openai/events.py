"""Streams of server-sent events, which end when their reader goes; work for somebody who waits."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from yuanmoe.http.answers import dumps, logged
from yuanmoe.http.errors import ApiError
from yuanmoe.serve.core.job import Job

KEEP_ALIVE_S = 15.0
"""A stream says something this often, or proxies take it for dead while a long prompt is read."""

LAST_WORD_S = 1.0
"""How long the last event may take to leave."""

T = TypeVar("T")


def event(value: Any) -> bytes:
    return b"data: " + dumps(value) + b"\n\n"


async def with_reader(request: Request, job: Job, timeout_s: float, work: Awaitable[T]) -> T:
    """Awaits work on a job for someone who waits; ends the job when they go, or the time is up (ApiError 408)."""
    watcher = asyncio.create_task(_close_when_gone(request.receive, job))
    try:
        async with asyncio.timeout(timeout_s):
            return await work
    except TimeoutError:
        raise too_slow(timeout_s) from None
    finally:
        watcher.cancel()
        job.close()


def too_slow(timeout_s: float) -> ApiError:
    return ApiError(
        408,
        f"the answer was not finished within {timeout_s:g} s, the limit of this server; ask for fewer tokens",
        code="timeout",
        retry=False,
    )


class EventStream(Response):
    """Server-sent events about a job, until `[DONE]`; an error on the way becomes the last event."""

    media_type = "text/event-stream"

    def __init__(
        self, job: Job, timeout_s: float, events: AsyncIterator[bytes], last: bytes = b"data: [DONE]\n\n"
    ) -> None:
        """`last` is what a stream ends with that has no error."""
        self.status_code = 200
        self.background = None
        # `X-Accel-Buffering` tells nginx to pass events on as they come.
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._job = job
        self._timeout_s = timeout_s
        self._events = events
        self._last = last
        self._quiet = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        async def write(body: bytes, more: bool = True) -> None:
            self._quiet = False
            await send({"type": "http.response.body", "body": body, "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        beside = [
            asyncio.create_task(_close_when_gone(receive, self._job)),
            asyncio.create_task(self._keep_alive(write)),
        ]
        try:
            # A reader that neither reads nor goes gets no more than this either.
            with contextlib.suppress(OSError, TimeoutError):
                last = await self._write_all(write)
                async with asyncio.timeout(LAST_WORD_S):
                    await write(last, more=False)
        finally:
            for task in beside:
                task.cancel()
            self._job.close()

    async def _write_all(self, write: Callable[[bytes], Awaitable[None]]) -> bytes:
        """Writes the events but the last, and returns it."""
        try:
            async with asyncio.timeout(self._timeout_s):
                async for some in self._events:
                    await write(some)
            return self._last
        except TimeoutError:
            return event(too_slow(self._timeout_s).body)
        except OSError:  # the reader went while something was written
            raise
        except Exception as error:
            return event(logged(error).body)

    async def _keep_alive(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        with contextlib.suppress(OSError):
            while True:
                await asyncio.sleep(KEEP_ALIVE_S)
                if self._quiet:
                    await write(b": still at work\n\n")
                self._quiet = True


async def _close_when_gone(receive: Receive, job: Job) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    job.close()
