"""An engine that says what a test tells it, routed by a rule that the test knows; the server around it is the real one.

Legend: L layers with experts, K chosen, E experts.
"""

import itertools
import time
from dataclasses import dataclass

import torch

from yuanmoe.config import ModelConfig
from yuanmoe.engine.requests import Request, RequestOutput, Stats, TokenRouting
from yuanmoe.errors import YuanError
from yuanmoe.text.tokenizer import Tokenizer


@dataclass(slots=True)
class _Speech:
    request: Request
    ids: list[int]
    said: int = 0


class ScriptedEngine:
    """`script` is what the next requests are answered, in order; the last line is said again and again."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.script: list[str] = ["Yes."]
        self.step_s = 0.0
        """How long a token takes."""
        self.requests: list[Request] = []
        self.cancelled: list[int] = []
        self.break_after: int | None = None
        """Tokens after which a request ends with an error."""
        self.layers = [layer for layer, experts in enumerate(config.experts_per_layer) if experts]
        self._ids = itertools.count()
        self._speeches: dict[int, _Speech] = {}
        self._load = torch.zeros(len(self.layers), max(config.experts_per_layer), dtype=torch.int64)

    def experts(self, token_id: int, position: int) -> list[list[int]]:
        """Where a token at a position goes, [L, K]: a walk that differs with the token, its place and the layer."""
        chosen = self.config.num_experts_per_tok
        return [
            [
                (token_id * 7 + position // 40 + layer * 3 + place * 11) % self.config.experts_per_layer[layer]
                for place in range(chosen)
            ]
            for layer in self.layers
        ]

    def routing(self, token_id: int, position: int) -> TokenRouting:
        experts = torch.tensor(self.experts(token_id, position))
        ranks = torch.arange(experts.shape[1], dtype=torch.float32)
        weights = (-ranks * (1 + (token_id + position) % 3)).softmax(0).expand(experts.shape)
        return TokenRouting(experts, weights)

    def submit(self, request: Request) -> int:
        number = next(self._ids)
        text = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        ids = [*self.tokenizer.encode(text, allow_special=False), self.tokenizer.eod_id]
        limit = request.params.max_new_tokens
        self.requests.append(request)
        self._speeches[number] = _Speech(request, ids[:limit])
        return number

    def cancel(self, request_id: int) -> bool:
        found = self._speeches.pop(request_id, None) is not None
        if found:
            self.cancelled.append(request_id)
        return found

    @property
    def has_work(self) -> bool:
        return bool(self._speeches)

    def step(self) -> list[RequestOutput]:
        time.sleep(self.step_s)
        return [self._say(number, speech) for number, speech in list(self._speeches.items())]

    def _say(self, number: int, speech: _Speech) -> RequestOutput:
        if speech.said == self.break_after:
            del self._speeches[number]
            return RequestOutput(number, -1, 0.0, error=YuanError("the test broke this answer"))
        token_id = speech.ids[speech.said]
        read = [*speech.request.prompt_ids, *speech.ids][len(speech.request.prompt_ids) + speech.said - 1]
        routing = self.routing(read, len(speech.request.prompt_ids) + speech.said - 1)
        self._load.scatter_add_(1, routing.experts, torch.ones_like(routing.experts))
        speech.said += 1
        reason = "stop" if token_id == self.tokenizer.eod_id else "length" if speech.said == len(speech.ids) else None
        if reason:
            del self._speeches[number]
        wanted = routing if speech.request.routing else None
        return RequestOutput(number, token_id, -0.1 * (token_id % 9), finish_reason=reason, routing=wanted)

    def stats(self) -> Stats:
        return Stats(
            queued=0,
            running=len(self._speeches),
            free_pages=1,
            used_pages=0,
            reusable_pages=0,
            steps=0,
            computed_tokens=int(self._load.sum()) // (len(self.layers) * self.config.num_experts_per_tok),
            generated_tokens=0,
            reused_tokens=0,
            preemptions=0,
            expert_load=self._load.clone(),
        )
