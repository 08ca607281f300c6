"""A run's curves for TensorBoard, where it is installed (`pip install 'yuanmoe[train]'`)."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

FOLDER = "tensorboard"


class Board:
    """Writes numbers by name and step; a context manager. Without TensorBoard it says so once and writes nothing.

    Where the disk fails curves end, and the run goes on: the same numbers are in its metrics.
    """

    def __init__(self, run_folder: Path, say: Callable[[str], None], *, resumed_at: int | None = None) -> None:
        self._writer: Any = None
        self._say = say
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            say("TensorBoard is not installed, so it gets no curves: pip install 'yuanmoe[train]'")
            return
        purge = None if resumed_at is None else resumed_at + 1
        with self._surviving():
            self._writer = SummaryWriter(str(run_folder / FOLDER), purge_step=purge)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is not None:
            with self._surviving():
                for name, value in values.items():
                    self._writer.add_scalar(name, value, step)

    def __enter__(self) -> "Board":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            with self._surviving():
                self._writer.close()

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._writer = None
            self._say(f"TensorBoard gets no more curves: {error}. Training goes on; metrics.jsonl has the numbers")
