"""A training run at the terminal: its steps shown, and signals that end it, saved.

Importing this file imports torch. Not here: the run itself (`yuanmoe.train.run`).
"""

import signal
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from rich.console import Console

from yuanmoe.checkpoint.formats.native_config import parse_dtype
from yuanmoe.cli.doctor.probe import matmul_rate
from yuanmoe.cli.terminal.interrupt import Interrupt
from yuanmoe.cli.train.adapter import print_adapted
from yuanmoe.cli.train.view import TrainingView
from yuanmoe.train.parallel.stages import state_dtype
from yuanmoe.train.run import Run
from yuanmoe.train.steps.loop import Progress
from yuanmoe.train.steps.meter import MeterReading


class TerminalObserver(ExitStack):
    """Shows a run on a console; a context manager, in which signals stop the run instead of the process."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        self.peak_flops = 0.0
        """What matrix products reach on this machine, on all ranks together."""
        self._run: Run | None = None
        self._view: TrainingView | None = None
        self._interrupt: Interrupt | None = None

    def began(self, run: Run) -> None:
        """Measures the machine, and opens the display."""
        job = run.job
        self._run = run
        if job.recipe.lora is not None:
            print_adapted(self.console, job.recipe.model, job.recipe.lora)
        with self.doing("measuring this machine's matrix products"):
            dtype = parse_dtype(job.recipe.run.dtype) if job.recipe.lora is None else state_dtype(job.model)
            device = next(job.model.parameters()).device
            self.peak_flops = matmul_rate(device, dtype, size=1024).high * job.ranks.size
        hint = "Ctrl-C saves and stops" if job.keeps else "Ctrl-C ends it sooner"
        view = TrainingView(console=self.console, peak_flops=self.peak_flops, hint=hint)
        self._view = self.enter_context(view)
        self._interrupt = self.enter_context(Interrupt((signal.SIGINT, signal.SIGTERM)))
        self._interrupt.graceful = True

    def stepped(self, progress: Progress, reading: MeterReading, heldout_bits: float | None) -> None:
        """Shows the step, and passes a signal on."""
        assert self._run is not None, "a run begins before its steps"
        assert self._view is not None, "a run begins before its steps"
        assert self._interrupt is not None, "a run begins before its steps"
        self._view.show(progress, reading, heldout_bits)
        if self._interrupt.number:
            self._run.stop(self._interrupt.number)

    def said(self, message: str) -> None:
        """Prints a message, indented as the display is once there is one."""
        indent = "" if self._run is None else "  "
        self.console.print(f"{indent}{message}", soft_wrap=True, markup=False)

    def doing(self, what: str) -> AbstractContextManager[Any]:
        """Shows what takes long, once the steps are over and before they begin."""
        self.close()
        return self.console.status(what)
