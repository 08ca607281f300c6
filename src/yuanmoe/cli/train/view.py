"""A training run on the terminal: loss, speed beside the machine's measured peak, and every layer's experts at work.

Where stderr is no terminal, the same numbers in a plain line now and then. Not here: what they mean
(`train/steps/meter.py`). Legend: L layers with experts, E experts.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType

from rich.console import Console, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from yuanmoe.cli.generate.experts import colour
from yuanmoe.routing.balance import Balance
from yuanmoe.train.steps.loop import Progress
from yuanmoe.train.steps.meter import MeterReading
from yuanmoe.units import format_count

BARS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
ASCII_BARS = " .:-=+*#@"
"""Nine heights of a line."""
EVEN_HEIGHT = 2
"""Of an even share of the load: an expert with four times as much fills the line."""

INDENT, NAME_WIDTH = 2, 9
CURVE_WIDTH = 40
REDRAW_S = 0.25
LINE_S = 10.0


@dataclass(slots=True, kw_only=True)
class TrainingView:
    """Shows one run while its `with` block lasts; `show` takes every step."""

    console: Console
    peak_flops: float
    """What matrix products reach on this machine, measured in the run's dtype."""
    hint: str
    """What Ctrl-C does."""
    curve: list[float] = field(default_factory=list)
    """Recent loss at even shares of the budget, nats a token."""
    heldout: list[float] = field(default_factory=list)
    """Bits a byte, as often as they were measured."""
    _live: Live | None = None
    _next_s: float = 0.0

    def __enter__(self) -> "TrainingView":
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, progress: Progress, reading: MeterReading, heldout: float | None) -> None:
        """The run after a step; `heldout` in bits a byte where it was measured."""
        if reading.loss is not None:
            self.curve += [reading.loss] * (round(progress.share * CURVE_WIDTH) - len(self.curve))
        self.heldout += [] if heldout is None else [heldout]
        now = time.monotonic()
        if now < self._next_s and heldout is None:
            return
        self._next_s = now + (LINE_S if self._live is None else REDRAW_S)
        if self._live is None:
            self.console.print(self._line(progress, reading), soft_wrap=True)
        else:
            self._live.update(self._panel(progress, reading), refresh=True)

    def _line(self, progress: Progress, reading: MeterReading) -> str:
        heldout = f", held out {self.heldout[-1]:.3f} bits/byte" if self.heldout else ""
        worst = max((layer.max_over_mean for layer in reading.balance), default=1.0)
        dead = sum(layer.dead_experts for layer in reading.balance)
        return (
            f"{progress.elapsed_s:4.0f} s, {progress.share:4.0%}: {progress.tokens:,} tokens, "
            f"loss {_nats(reading.loss)}{heldout}, {self._speed(reading)}, "
            f"busiest expert {worst:.1f} x even, {dead} dead"
        )

    def _speed(self, reading: MeterReading) -> str:
        share = reading.flops_per_s / self.peak_flops
        return (
            f"{reading.tokens_per_s:,.0f} tokens/s, {format_count(reading.flops_per_s, 'FLOP/s')}: "
            f"{share:.0%} of the {format_count(self.peak_flops, 'FLOP/s')} measured here"
        )

    def _panel(self, progress: Progress, reading: MeterReading) -> RenderableType:
        bars = ASCII_BARS if self.console.options.ascii_only else BARS
        left = progress.elapsed_s * (1 / progress.share - 1)
        clock = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=1.0, completed=progress.share, width=CURVE_WIDTH)
        clock.add_row(bar, f"{left:.0f} s left; {self.hint}")
        grid = Table.grid(padding=(0, 2))
        grid.add_column(width=NAME_WIDTH)
        grid.add_row("training", clock)
        grid.add_row(
            "loss", Text.assemble((sparkline(self.curve, bars), "cyan"), f" {_nats(reading.loss)} nats a token")
        )
        heldout = " ".join(f"{bits:.2f}" for bits in self.heldout)
        grid.add_row("held out", f"{heldout} bits a byte" if heldout else "")
        grid.add_row("speed", self._speed(reading))
        for place, (load, balance) in enumerate(zip(reading.load, reading.balance, strict=True)):
            grid.add_row(f"experts {place}", load_strip(load, bars) + Text(f"  {describe(balance)}", style="dim"))
        return Padding(grid, (0, 0, 0, INDENT))


def _nats(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3f}"


def sparkline(values: Sequence[float], bars: str) -> str:
    """One character a value, the largest at full height."""
    if not values:
        return ""
    low, high = min(values), max(values)
    scale = (len(bars) - 2) / (high - low) if high > low else 0.0
    return "".join(bars[1 + round((value - low) * scale)] for value in values)


def load_strip(load: Sequence[int], bars: str) -> Text:
    """One bar an expert, in its colour, as high as its share of the layer's load."""
    mean = sum(load) / len(load)
    strip = Text()
    for expert, count in enumerate(load):
        height = min(len(bars) - 1, round(EVEN_HEIGHT * count / mean))
        strip.append(bars[max(height, int(count > 0))], style=f"color({colour(expert)})")
    return strip


def describe(balance: Balance) -> str:
    """A layer's balance in words."""
    dead = f", {balance.dead_experts} dead" if balance.dead_experts else ""
    return f"busiest {balance.max_over_mean:.1f} x even, {balance.effective_experts:.0f} effective{dead}"
