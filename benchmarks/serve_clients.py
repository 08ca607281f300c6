"""Clients for measuring a server: raw streams over plain sockets, which count what comes and parse next to nothing.

The requests are completions of random ids, of random length, that never end by themselves: every token that is computed
is one that was asked for.
"""

import asyncio
import itertools
import json
import random
import re
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

PROMPT_TOKENS = (8, 96)
NEW_TOKENS = (32, 128)
VOCABULARY = 400
"""Prompts are drawn from the first so many ids, which every tokenizer has; 0 to 5 may be special."""


@dataclass(slots=True)
class Answer:
    """What one request saw."""

    began: float
    arrivals: list[float] = field(default_factory=list)
    """When events came that said something."""
    tokens: int = 0
    """As the usage at its end says; 0 where it was cut."""
    error: str = ""
    cancelled: bool = False

    @property
    def gaps(self) -> list[float]:
        return [later - sooner for sooner, later in itertools.pairwise(self.arrivals)]


class Clients:
    """People who ask again as soon as they are answered."""

    def __init__(self, url: str, model: str, seed: int = 0) -> None:
        self._address = urlsplit(url)
        self._model = model
        self._random = random.Random(seed)
        self.answers: list[Answer] = []

    async def crowd(self, number: int, seconds: float, *, cancelling: float = 0.0) -> None:
        """So many at once; after `seconds` nobody asks anew. A share of the requests, `cancelling`, is left early."""
        end = time.monotonic() + seconds
        await asyncio.gather(*(self._one(end, cancelling) for _ in range(number)))

    async def _one(self, end: float, cancelling: float) -> None:
        while time.monotonic() < end:
            tokens = self._random.randint(*NEW_TOKENS)
            leaving = self._random.random() < cancelling
            patience = self._random.uniform(0, 0.5) if leaving else None
            self.answers.append(await self.ask(tokens, patience))

    async def ask(self, new_tokens: int, patience: float | None = None) -> Answer:
        """One request; left after `patience` seconds."""
        answer = Answer(time.monotonic())
        try:
            async with asyncio.timeout(patience):
                await self._stream(new_tokens, answer)
        except TimeoutError:
            answer.cancelled = True
        except OSError as error:
            answer.error = repr(error)
        return answer

    async def _stream(self, new_tokens: int, answer: Answer) -> None:
        reader, writer = await asyncio.open_connection(self._address.hostname, self._address.port)
        try:
            writer.write(self._request(new_tokens))
            tail = b""
            while data := await reader.read(65536):
                if data.count(b'"text":"'):
                    answer.arrivals.append(time.monotonic())
                tail = (tail + data)[-2000:]
                if b'"error":' in data:
                    answer.error = data.decode(errors="replace")
        finally:
            writer.close()
        total = re.search(rb'"completion_tokens":(\d+)', tail)
        answer.tokens = int(total[1]) if total else 0
        if answer.tokens != new_tokens or b"data: [DONE]" not in tail:
            answer.error = answer.error or f"{answer.tokens} of {new_tokens} tokens"

    def _request(self, new_tokens: int) -> bytes:
        length = self._random.randint(*PROMPT_TOKENS)
        body = {
            "model": self._model,
            "prompt": [self._random.randrange(6, VOCABULARY) for _ in range(length)],
            "max_tokens": new_tokens,
            "logit_bias": {"0": -100},
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        data = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {self._address.netloc}\r\nContent-Type: application/json\r\n"
            f"Connection: close\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        return head.encode() + data
