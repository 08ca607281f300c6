"""The process around the application: its socket, its signals, and an end that loses nobody's answer.

The first SIGTERM or Ctrl-C stops taking requests and lets those inside finish, for a bounded time; a second Ctrl-C
stops at once.
"""

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from yuanmoe.errors import UsageError
from yuanmoe.serve.core.worker import EngineWorker

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LAST_WORDS_S = 3
"""After the time to finish: for telling those that were not."""


def bind(host: str, port: int) -> socket.socket:
    """A socket at the address, that does not listen yet. Raises UsageError where it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise UsageError(
            f"cannot listen at {host} port {port}: {error}; name another with --host and --port"
        ) from error
    return bound


def url(bound: socket.socket) -> str:
    """Where browsers and clients find it."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Uvicorn, with a worker that is told when the end begins."""

    def __init__(self, app: FastAPI, worker: EngineWorker, *, drain_s: int) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                ws="none",
                # Longer than clients keep idle connections, or one closes just as they ask again.
                timeout_keep_alive=75,
                lifespan="on",
                timeout_graceful_shutdown=drain_s + LAST_WORDS_S,
            )
        )
        self._worker = worker
        self._drain_s = drain_s

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike the original does not raise the signals again: the program ends by returning."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._worker.draining = True
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
            # Tasks that are cut would each print a traceback.
            logging.getLogger("uvicorn.error").disabled = True
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Waits for answers, and ends with an error those that take too long."""
        timer = asyncio.get_running_loop().call_later(self._drain_s, self._worker.abandon)
        await super().shutdown(sockets)
        timer.cancel()
