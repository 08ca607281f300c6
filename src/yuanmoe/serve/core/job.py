"""Requests of the engine that one client waits for. Lives on the event loop, and knows no threads (`worker`)."""

import asyncio
import time
from collections.abc import Callable, Sequence

from yuanmoe.engine.requests import RequestOutput


class Job:
    """Engine requests that one client waits for, and their outputs as they come."""

    def __init__(self, forget: Callable[[int, str], None]) -> None:
        """`forget` ends a request of the engine, for a reason."""
        self._forget = forget
        self.since = time.monotonic()
        """When the client began to wait."""
        self._ids: dict[int, int] = {}
        """Live requests: place in the job, id in the engine."""
        self._pending: list[tuple[int, RequestOutput]] = []
        self._wake = asyncio.Event()
        self._failure: Exception | None = None
        self.closed = False

    async def outputs(self) -> list[tuple[int, RequestOutput]]:
        """What came since the last call, each with the place of its request; nothing once all have ended.

        Raises the error that ended one of them after what came before it, and then ends the others.
        """
        while self._ids and not self._pending and self._failure is None:
            self._wake.clear()
            await self._wake.wait()
        if self._failure is not None and not self._pending:
            self.close()
            raise self._failure
        pending, self._pending = self._pending, []
        return pending

    def end(self, index: int, reason: str) -> None:
        """Ends one request, within a step; what it says meanwhile is dropped."""
        request_id = self._ids.pop(index, None)
        if request_id is not None:
            self._forget(request_id, reason)

    def close(self) -> None:
        """Ends what has not ended by itself."""
        self.closed = True
        for index in list(self._ids):
            self.end(index, "cancelled")
        self._wake.set()

    # What the worker calls, on the event loop:

    def accepted(self, ids: Sequence[int]) -> None:
        self._ids = dict(enumerate(ids))

    def take(self, index: int, output: RequestOutput) -> None:
        if output.error is not None:
            self._failure = output.error
        else:
            self._pending.append((index, output))
        if output.error is not None or output.finish_reason is not None:
            self._ids.pop(index, None)

    def fail(self, error: Exception) -> None:
        self._failure = error
        self._ids.clear()

    def wake(self) -> None:
        self._wake.set()
