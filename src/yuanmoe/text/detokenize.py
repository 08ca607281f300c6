"""Tokens to text while they arrive: whole characters only, and nothing of a stop string.

Not here: sampling, transport. Both classes take constant time a token, whatever came before.
"""

import codecs
from collections.abc import Sequence

from yuanmoe.errors import UsageError
from yuanmoe.text.tokenizer import Tokenizer


class StreamingDetokenizer:
    """Text of tokens as they are pushed; all of it, `flush` included, equals `tokenizer.decode` of all of them.

    Bytes of an unfinished character are held back, at most three. `previous` is the id before the first one, where
    the tokens continue something: `prompt_ids[-1]` for the answer to a prompt.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special: bool = False,
        previous: int | None = None,
        unfinished: bytes = b"",
    ) -> None:
        """`unfinished` is the beginning of a character that the first token may finish."""
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._previous = previous
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._characters.decode(unfinished)

    @property
    def unfinished(self) -> bytes:
        """The beginning of a character that is held back."""
        return self._characters.getstate()[0]

    def push(self, token_id: int) -> str:
        """The characters that are complete after this token, possibly none."""
        data = self._tokenizer.surface(token_id, self._previous, self._skip_special)
        self._previous = token_id
        return self._characters.decode(data)

    def flush(self) -> str:
        """The remaining text when no token follows: U+FFFD for an unfinished character."""
        return self._characters.decode(b"", final=True)


class StopStrings:
    """Lets text through up to the first stop string to be completed; it is held back while it may still become one.

    The outcome does not depend on how the text is cut into pieces: the stop string that ends first wins, the longest
    of those that end together. One Knuth-Morris-Pratt automaton for each stop string, so a long one costs no more.
    """

    def __init__(self, stops: str | Sequence[str]) -> None:
        """One stop string, or several. Raises UsageError for one that is empty."""
        stops = [stops] if isinstance(stops, str) else stops
        if "" in stops:
            which = f"stop string {list(stops).index('')}" if len(stops) > 1 else "the stop string"
            raise UsageError(f"{which} is empty, which would stop every answer at once")
        self._automata = [_Automaton(stop) for stop in stops]
        self._held = ""
        self.matched: str | None = None
        """The stop string that was found; nothing is let through after it."""

    def push(self, text: str) -> str:
        """The part of the held text and `text` that belongs to no stop string."""
        if self.matched is not None:
            return ""
        if not self._automata:
            return text
        pending = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            found = [automaton.stop for automaton in self._automata if automaton.step(character)]
            if found:
                self.matched = max(found, key=len)
                self._held = ""
                return pending[: end - len(self.matched)]
        sure = len(pending) - max((automaton.matched for automaton in self._automata), default=0)
        self._held = pending[sure:]
        return pending[:sure]

    def flush(self) -> str:
        """The text that was held back, to be called when no text follows."""
        rest, self._held = self._held, ""
        return rest


class _Automaton:
    """How much of one stop string the text ends with, character by character (Knuth, Morris, Pratt 1977)."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        self._borders = [0] * len(stop)  # [i]: longest proper prefix of stop that ends at its character i
        border = 0
        for place in range(1, len(stop)):
            while border and stop[place] != stop[border]:
                border = self._borders[border - 1]
            border += stop[place] == stop[border]
            self._borders[place] = border

    def step(self, character: str) -> bool:
        """Take one character; whether the stop string is complete, after which no more may follow."""
        while self.matched and character != self.stop[self.matched]:
            self.matched = self._borders[self.matched - 1]
        self.matched += character == self.stop[self.matched]
        return self.matched == len(self.stop)
