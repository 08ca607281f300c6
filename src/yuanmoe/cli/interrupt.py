"""Ctrl-C while something is on its way that is worth keeping."""

import signal
from types import FrameType, TracebackType


class Interrupt:
    """While `graceful` is set, the first Ctrl-C only sets `requested`, for whoever works to stop at a good place.

    Before that, and the second time, it is the usual KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.graceful = False
        self.requested = False

    def __enter__(self) -> "Interrupt":
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.requested or not self.graceful:
            raise KeyboardInterrupt
        self.requested = True
