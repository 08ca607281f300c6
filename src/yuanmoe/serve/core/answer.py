"""Tokens of one choice turned into what is said about them: text, log-probabilities, routing.

Text is whole characters and holds nothing of a stop string; both are `data.detokenize`'s. Legend: L layers with
experts, K chosen.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from yuanmoe.engine.requests import FinishReason, PromptLogprobs, RequestOutput, TokenRouting, TopLogprobs
from yuanmoe.text.detokenize import StopStrings, StreamingDetokenizer
from yuanmoe.text.tokenizer import Tokenizer

LOWEST = -9999.0
"""What the API says for a token of probability 0, whose logarithm JSON cannot hold."""


class Said(NamedTuple):
    """One token that belongs to the answer."""

    token_id: int
    surface: bytes
    """What it adds to the text."""
    logprob: float
    top: TopLogprobs


@dataclass(slots=True)
class Delta:
    """What came to an answer."""

    text: str = ""
    tokens: list[Said] = field(default_factory=list)
    """Without the stop token. Their text may come later: it is held back while it may become a stop string."""
    routings: list[TokenRouting] = field(default_factory=list)
    """Of the tokens that passes read: the prompt's last one first."""

    def extend(self, later: "Delta") -> None:
        self.text += later.text
        self.tokens += later.tokens
        self.routings += later.routings


class Answer:
    """One choice as it grows."""

    def __init__(self, tokenizer: Tokenizer, previous: int | None, stop: Sequence[str]) -> None:
        """`previous` is the last token of the text that is continued; None where a text of its own begins."""
        self._tokenizer = tokenizer
        self._previous = previous
        self._stops = StopStrings(stop)
        self._detokenizer = StreamingDetokenizer(tokenizer, skip_special=True, previous=previous)
        self.num_tokens = 0
        """Generated so far, the one that ended the answer included."""
        self.reused_tokens = 0
        """Of the prompt, that were found computed."""
        self.finish_reason: FinishReason | None = None
        self.prompt: PromptLogprobs | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the answer, which the engine cannot know."""
        return self._stops.matched is not None

    def push(self, outputs: Iterable[RequestOutput]) -> Delta:
        """What these outputs add; nothing once the answer is finished."""
        delta = Delta()
        for output in outputs:
            if self.finish_reason is None:
                self._push(output, delta)
        return delta

    def _push(self, output: RequestOutput, delta: Delta) -> None:
        if self.num_tokens == 0:
            self.reused_tokens = output.reused_tokens
            self.prompt = output.prompt
        self.num_tokens += 1
        if output.routing is not None:
            delta.routings.append(output.routing)
        if output.finish_reason != "stop":
            surface = self._tokenizer.surface(output.token_id, self._previous, skip_special=True)
            self._previous = output.token_id
            delta.tokens.append(Said(output.token_id, surface, output.logprob, output.top_logprobs))
            delta.text += self._stops.push(self._detokenizer.push(output.token_id))
        self.finish_reason = output.finish_reason
        if self.finish_reason is not None and not self.stopped:
            delta.text += self._stops.push(self._detokenizer.flush()) + self._stops.flush()
        if self.stopped:
            self.finish_reason = "stop"


def token_name(data: bytes) -> str:
    """The text of a token; of part of a character its bytes, as the OpenAI API spells them."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
