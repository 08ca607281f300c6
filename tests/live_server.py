"""A server in a thread of the test, at a free port of this machine."""

import contextlib
import threading
import time
from collections.abc import Iterator

import uvicorn

from yuanmoe.serve.launch import Launched
from yuanmoe.serve.server import bind, url


@contextlib.contextmanager
def running(launched: Launched) -> Iterator[str]:
    """The server's URL, until the end of the block."""
    bound = bind("127.0.0.1", 0)
    # Uvicorn's own class: ours takes signals, which only a main thread may.
    server = uvicorn.Server(launched.server.config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield url(bound)
    finally:
        server.should_exit = True
        thread.join(10)
        bound.close()
    assert not thread.is_alive()
