"""A real server over a small model, in a thread of this process, at a free port of this machine."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx

from small_lm import small_lm
from yuanmoe.engine.engine import Engine
from yuanmoe.engine.requests import RequestOutput, Stats
from yuanmoe.lm import LanguageModel
from yuanmoe.serve.core.launch import PAGE_SIZE, Launched, Settings, launch, launch_engine
from yuanmoe.serve.core.server import bind, url
from yuanmoe.serve.core.service import Service

MODEL = "small"
CONTEXT = 1024
CACHE_TOKENS = 4096
LONG = {"prompt": "def add(", "max_tokens": 900, "logit_bias": {"0": -100}}
"""A request that goes on until somebody stops it."""


class Running(NamedTuple):
    """A server that answers."""

    url: str
    service: Service
    lm: LanguageModel

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        with httpx.Client(base_url=self.url, timeout=20) as client:
            return client.post(path, json=body, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        with httpx.Client(base_url=self.url, timeout=20) as client:
            return client.get(path, **options)

    @property
    def stats(self) -> Stats:
        """The engine's numbers, as `/metrics` shows them."""
        return self.service.worker.stats

    def wait(self, holds: Callable[[], bool], seconds: float = 10) -> bool:
        """Whether something comes true in time."""
        end = time.monotonic() + seconds
        while not holds() and time.monotonic() < end:
            time.sleep(0.005)
        return holds()


class SlowEngine(Engine):
    """An engine whose steps take time, and which dies when told to."""

    step_s = 0.0
    dies = False

    def step(self) -> list[RequestOutput]:
        time.sleep(self.step_s)
        if self.dies:
            raise MemoryError("the engine was told to die")
        return super().step()


def slow_engine(lm: LanguageModel, step_s: float = 0.02) -> SlowEngine:
    engine = SlowEngine(lm.model, vocab_size=lm.tokenizer.vocab_size, cache_tokens=CACHE_TOKENS, page_size=PAGE_SIZE)
    engine.step_s = step_s
    return engine


@contextmanager
def running(engine: Engine | None = None, **changes: Any) -> Iterator[Running]:
    """A server for as long as the block runs; `changes` are Settings."""
    lm = small_lm(max_position_embeddings=CONTEXT)
    settings = Settings(**{"model_id": MODEL, "cache_tokens": CACHE_TOKENS, "drain_s": 2} | changes)
    launched = launch(lm, settings) if engine is None else launch_engine(lm, engine, CACHE_TOKENS, settings)
    with serving(launched) as address:
        yield Running(address, launched.service, lm)


@contextmanager
def serving(launched: Launched) -> Iterator[str]:
    bound = bind("127.0.0.1", 0)
    address = url(bound)
    server = launched.server
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])))
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.005)
        yield address
    finally:
        server.should_exit = True
        thread.join(15)
        assert not thread.is_alive(), "the server ends when it is told to"
