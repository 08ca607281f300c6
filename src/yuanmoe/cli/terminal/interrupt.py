"""Ctrl-C, or a polite request to end, while something is on its way that is worth keeping."""

import signal
from collections.abc import Sequence
from types import FrameType, TracebackType


class Interrupt:
    """While `graceful` is set, the first signal only sets `requested`, for whoever works to stop at a good place.

    Before that, and the second time, it is the usual KeyboardInterrupt.
    """

    def __init__(self, signals: Sequence[signal.Signals] = (signal.SIGINT,)) -> None:
        self.graceful = False
        self.requested = False
        self.number = 0
        """Of the signal that came."""
        self._signals = signals

    def __enter__(self) -> "Interrupt":
        self._previous = {each: signal.signal(each, self._handle) for each in self._signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each, handler in self._previous.items():
            signal.signal(each, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.requested or not self.graceful:
            raise KeyboardInterrupt
        self.requested = True
        self.number = number
