"""Tokens of one choice turned into what is said about them: text, log-probabilities, routing.

Text is whole characters and holds nothing of a stop string; both are `text.answer_text`'s. Legend: L layers with
experts, K chosen.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from yuanmoe.engine.requests import FinishReason, PromptLogprobs, RequestOutput, TokenRouting, TopLogprobs
from yuanmoe.text.answer_text import AnswerText
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
    """Those of the text: neither the stop token, nor what is held back because it may become a stop string."""
    routings: list[TokenRouting] = field(default_factory=list)
    """Of the tokens that passes read: the prompt's last one first."""

    def extend(self, later: "Delta") -> None:
        self.text += later.text
        self.tokens += later.tokens
        self.routings += later.routings


@dataclass(slots=True)
class _Waiting:
    """A token whose text is not certain yet."""

    said: Said
    text: str
    """What it added, the end of a character that it finished included."""
    before: bytes
    """The beginning of that character, which is of earlier tokens."""
    start: int
    """The character of the answer that it begins in."""
    end: int
    """The character that it reaches."""


class Answer:
    """One choice as it grows. Tokens are listed with their text, so that a stop string's are not listed."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        """`prompt_ids` is what the answer continues. Raises UsageError for an empty stop string."""
        self._tokenizer = tokenizer
        self._previous = prompt_ids[-1] if prompt_ids else None
        self._text = AnswerText(tokenizer, prompt_ids, stop)
        self._waiting: deque[_Waiting] = deque()
        self.num_tokens = 0
        """Generated so far, the one that ended the answer included."""
        self.reused_tokens = 0
        """Of the prompt, that were found computed."""
        self.finish_reason: FinishReason | None = None
        self.prompt: PromptLogprobs | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the answer, which the engine cannot know."""
        return self._text.stopped

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
            delta.text += self._read(output)
        self.finish_reason = output.finish_reason
        if self.finish_reason is not None and not self.stopped:
            delta.text += self._text.finish()
        if self.stopped:
            self.finish_reason = "stop"
        delta.tokens += self._certain()

    def _read(self, output: RequestOutput) -> str:
        text, before, start = self._text, self._text.unfinished, self._text.read
        surface = self._tokenizer.surface(output.token_id, self._previous, skip_special=True)
        self._previous = output.token_id
        said = Said(output.token_id, surface, output.logprob, output.top_logprobs)
        certain = text.push(output.token_id)
        added = (before + surface).decode(errors="ignore")
        self._waiting.append(_Waiting(said, added, before, start, text.reached))
        return certain

    def _certain(self) -> Iterator[Said]:
        """The tokens of the text that was let through; one that a stop string cuts keeps the bytes before it."""
        end = self._text.said
        while self._waiting and (self._waiting[0].end <= end or self.finish_reason is not None):
            waiting = self._waiting.popleft()
            if waiting.end <= end or not self.stopped:
                yield waiting.said
            elif waiting.start < end:
                kept = waiting.text[: end - waiting.start].encode()[len(waiting.before) :]
                yield waiting.said._replace(surface=kept)


def token_name(data: bytes) -> str:
    """The text of a token; of part of a character its bytes, as the OpenAI API spells them."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
