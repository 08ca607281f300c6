"""The one thing between HTTP and the engine: a thread that owns the engine, and what the event loop holds of it.

Commands go in by a queue and run between two steps; the outputs of a step come out together, in one call of the event
loop. Bursts are shared: jobs wake at most every `WAKE_S`, since at thousands of tokens a second waking is what costs;
but at once for a first token and an end, which people wait for.
An engine that dies ends every job with an error, and every later one at once: nothing ever waits for a dead thread.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from yuanmoe.engine.requests import Request, RequestOutput, Stats
from yuanmoe.http.errors import UnavailableError
from yuanmoe.serve.core.job import Job

WAKE_S = 0.02
"""Tokens that come faster reach their client together: nobody reads more than fifty pieces a second."""
STATS_S = 0.25
"""How old the published statistics of a busy engine may be."""

log = logging.getLogger(__name__)


class AnyEngine(Protocol):
    """What is asked of an engine; all of it from one thread."""

    def submit(self, request: Request) -> int: ...
    def cancel(self, request_id: int) -> bool: ...
    def step(self) -> list[RequestOutput]: ...
    @property
    def has_work(self) -> bool: ...
    def stats(self) -> Stats: ...


class Observer(Protocol):
    """Who counts, on the event loop."""

    def accepted(self, request: Request) -> None: ...
    def first_token(self, waited_s: float) -> None: ...
    def next_token(self, gap_s: float) -> None: ...
    def ended(self, reason: str) -> None: ...


@dataclass(slots=True)
class _Place:
    """Where the outputs of one request go."""

    job: Job
    index: int
    since: float
    """When its last token came, or the request, if none did."""
    started: bool = False


class EngineWorker:
    """Runs an engine in a thread of its own. Everything but that thread happens on one event loop."""

    def __init__(self, engine: AnyEngine, observer: Observer, *, capacity: int) -> None:
        """`capacity` bounds the requests inside, those at work and those that wait."""
        self._engine = engine
        self._observer = observer
        self._capacity = capacity
        self._commands: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._places: dict[int, _Place] = {}
        self._asking: dict[asyncio.Future[None], int] = {}
        """Submissions on their way to the engine, and their requests."""
        self._ready: set[Job] = set()
        self._woken = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.failure: BaseException | None = None
        """What the engine died of."""
        self.draining = False
        """Whether the process is about to end: what is inside is finished, nothing else is taken."""
        self.stats = engine.stats()
        """At most `STATS_S` old while the engine works, exact while it rests."""
        self.step_s = 0.0
        """Seconds inside the engine's steps."""
        self.busy_s = 0.0
        """Seconds during which there was work, those between steps included."""

    def start(self) -> None:
        """Begins to work, for the event loop that calls."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self, timeout_s: float) -> None:
        """Ends the thread after the step that it is in, whatever is unfinished; waits so long at most."""
        self._commands.put(self._stop)
        await asyncio.to_thread(self._thread.join, timeout_s)

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def load(self) -> int:
        """Requests inside."""
        return len(self._places) + sum(self._asking.values())

    def check(self, num_requests: int = 1) -> None:
        """Raises UnavailableError where so many more requests could not be taken now."""
        if self.failure is not None:
            raise self._dead()
        if self.draining:
            raise _shutting_down()
        if self.load + num_requests > self._capacity:
            raise UnavailableError(
                f"{self.load} sequences are inside or wait, {num_requests} more would exceed the {self._capacity} that "
                "this server takes; ask again in a moment",
                code="queue_full",
                retry_after_s=1,
            )

    async def submit(self, requests: Sequence[Request]) -> Job:
        """Hands requests to the engine. Raises what it says to them, and UnavailableError; then none is inside."""
        self.check(len(requests))
        job, answer = Job(self.forget), self._loop.create_future()
        self._asking[answer] = len(requests)
        self._commands.put(partial(self._submit, job, requests, answer))
        try:
            await answer
        except asyncio.CancelledError:
            job.close()
            raise
        finally:
            self._asking.pop(answer, None)
        for request in requests:
            self._observer.accepted(request)
        return job

    def forget(self, request_id: int, reason: str) -> None:
        """Ends a request whose further outputs nobody wants, before the next step."""
        if self._places.pop(request_id, None) is not None:
            self._observer.ended(reason)
        self._commands.put(partial(self._engine.cancel, request_id))

    # --- on the engine's thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                if not self._engine.has_work:
                    self._publish()
                    self._commands.get()()
                began = time.monotonic()
                while not self._commands.empty():
                    self._commands.get()()
                if self._engine.has_work and not self._stopping:
                    self._step()
                self.busy_s += time.monotonic() - began
        except BaseException as error:  # whatever it is: those who wait must hear of it
            log.exception("the engine has died")
            self._on_loop(self._die, error)

    def _step(self) -> None:
        began = time.monotonic()
        outputs = self._engine.step()
        now = time.monotonic()
        self.step_s += now - began
        if outputs:
            self._on_loop(self._arrive, now, outputs)
        if now - self._published > STATS_S:
            self._publish()

    def _publish(self) -> None:
        self.stats = self._engine.stats()
        self._published = time.monotonic()

    def _submit(self, job: Job, requests: Sequence[Request], answer: asyncio.Future[None]) -> None:
        ids: list[int] = []
        try:
            for request in requests:
                ids.append(self._engine.submit(request))
        except Exception as error:  # theirs or a bug of ours: either way an answer to this job, not the engine's end
            for request_id in ids:
                self._engine.cancel(request_id)
            self._on_loop(_refuse, answer, error)
        else:
            self._on_loop(self._accept, job, ids, answer)

    def _stop(self) -> None:
        self._stopping = True

    def _on_loop(self, call: Callable[..., None], *arguments: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *arguments)

    # --- on the event loop --------------------------------------------------------------------------------------------

    def _accept(self, job: Job, ids: Sequence[int], answer: asyncio.Future[None]) -> None:
        self._places |= {request_id: _Place(job, index, job.since) for index, request_id in enumerate(ids)}
        job.accepted(ids)
        if job.closed:
            job.close()
        if not answer.done():
            answer.set_result(None)

    def _arrive(self, now: float, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            place = self._places.get(output.request_id)
            if place is None:  # cancelled while the step ran
                continue
            is_ended = output.error is not None or output.finish_reason is not None
            is_awaited = is_ended or not place.started
            if output.error is None:
                (self._observer.next_token if place.started else self._observer.first_token)(now - place.since)
                place.started, place.since = True, now
            if is_ended:
                del self._places[output.request_id]
                self._observer.ended(output.finish_reason or "error")
            place.job.take(place.index, output)
            self._ready.add(place.job)
            if is_awaited:
                place.job.wake()
        wait = self._woken + WAKE_S - time.monotonic()
        if wait <= 0:
            self._wake()
        elif self._timer is None:
            self._timer = self._loop.call_later(wait, self._wake)

    def _wake(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._woken = time.monotonic()
        for job in self._ready:
            job.wake()
        self._ready.clear()

    def abandon(self) -> None:
        """Ends everything inside with an error: the process cannot wait any longer."""
        self.draining = True
        self._end_all(_shutting_down())

    def _die(self, error: BaseException) -> None:
        self.failure = error
        self._end_all(self._dead())

    def _end_all(self, error: UnavailableError) -> None:
        for answer in self._asking:
            _refuse(answer, error)
        for job in {place.job for place in self._places.values()}:
            job.fail(error)
            job.wake()
        self._places.clear()

    def _dead(self) -> UnavailableError:
        return UnavailableError(f"the engine has died ({self.failure!r}); restart the server", code="engine_dead")


def _shutting_down() -> UnavailableError:
    return UnavailableError("the server is shutting down; ask another one", code="shutting_down")


def _refuse(answer: asyncio.Future[None], error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)
