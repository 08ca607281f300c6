"""The text of an answer while its tokens arrive: whole characters, up to a stop string, and how far it got.

Not here: sampling, log-probabilities, transport.
"""

import codecs
from collections.abc import Sequence

from yuanmoe.text.detokenize import StopStrings, StreamingDetokenizer
from yuanmoe.text.tokenizer import Tokenizer

LONGEST_CHARACTER = 4
"""Bytes of UTF-8, so that an unfinished one is within as many of the last tokens that hold any."""


class AnswerText:
    """Text that is said of an answer, as its tokens are pushed.

    An answer to a prompt that ends inside a character begins with that character, whole: prompt (without it) and answer
    are then what `tokenizer.decode` makes of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        """`prompt_ids` is what the answer continues. Raises UsageError for an empty stop string."""
        previous = prompt_ids[-1] if prompt_ids else None
        self._stops = StopStrings(stop)
        self._detokenizer = StreamingDetokenizer(
            tokenizer, skip_special=True, previous=previous, unfinished=unfinished_bytes(tokenizer, prompt_ids)
        )
        self.said = 0
        """Characters that were let through."""
        self.read = 0
        """Whole characters of the tokens so far, those of a stop string included."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the answer."""
        return self._stops.matched is not None

    @property
    def reached(self) -> int:
        """Characters that the tokens so far are part of, an unfinished one included."""
        return self.read + bool(self._detokenizer.unfinished)

    @property
    def unfinished(self) -> bytes:
        """The beginning of a character that the next token may finish."""
        return self._detokenizer.unfinished

    def push(self, token_id: int) -> str:
        """The text that is certain now and was not before."""
        return self._let_through(self._detokenizer.push(token_id))

    def finish(self) -> str:
        """The text that was held back, when no token follows."""
        text = self._let_through(self._detokenizer.flush())
        held = self._stops.flush()
        self.said += len(held)
        return text + held

    def _let_through(self, text: str) -> str:
        self.read += len(text)
        certain = self._stops.push(text)
        self.said += len(certain)
        return certain


def unfinished_bytes(tokenizer: Tokenizer, ids: Sequence[int]) -> bytes:
    """The beginning of a character that the text of `ids` ends with; empty where it ends with a whole one."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    last = list(ids[-LONGEST_CHARACTER:])
    for place, token_id in enumerate(last):
        if 0 <= token_id < tokenizer.vocab_size:
            decoder.decode(tokenizer.surface(token_id, last[place - 1] if place else None))
    return decoder.getstate()[0]
