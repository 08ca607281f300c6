"""A run's curves for TensorBoard, where it is installed (`pip install 'yuanmoe[train]'`)."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

FOLDER = "tensorboard"


class Board:
    """Writes numbers by name and step; a context manager. Without TensorBoard it says so once and writes nothing."""

    def __init__(self, run_folder: Path, say: Callable[[str], None], *, resumed_at: int | None = None) -> None:
        self._writer: Any = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            say("TensorBoard is not installed, so it gets no curves: pip install 'yuanmoe[train]'")
            return
        purge = None if resumed_at is None else resumed_at + 1
        self._writer = SummaryWriter(str(run_folder / FOLDER), purge_step=purge)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def __enter__(self) -> "Board":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()
