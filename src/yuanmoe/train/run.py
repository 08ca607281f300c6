"""A training run as a library object: begun or gone on with, observed, stopped, and saved as it goes.

The command line, a notebook and a server hold the same `Run`; what they show is theirs, through a `RunObserver`.
`train` does from Python what `yuanmoe train` does. Not here: the steps (`steps/loop.py`), what is written (`desk.py`).
Importing this file imports torch.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypedDict, Unpack

import torch

from yuanmoe.checkpoint.formats.native_config import Origin
from yuanmoe.checkpoint.open import OpenCheckpoint, open_checkpoint
from yuanmoe.errors import TrainingError
from yuanmoe.plan.cluster.layout import Layout
from yuanmoe.storage.run_folder import claimed_run
from yuanmoe.train.desk import Desk, TrainingJob, bits_of
from yuanmoe.train.parallel.layout import laid_out, layout_of
from yuanmoe.train.parallel.ranks import Ranks, joined, local_device, world_size
from yuanmoe.train.parallel.shard import sharded
from yuanmoe.train.recipe.recipe import Recipe
from yuanmoe.train.recipe.recipes import named
from yuanmoe.train.recipe.resolve import Settings, check_has_base, resolve
from yuanmoe.train.start.adapt import adapted_model
from yuanmoe.train.start.data import TrainingData, open_data
from yuanmoe.train.start.model import loaded_model, new_model
from yuanmoe.train.start.place import (
    CHECKPOINTS,
    RunPlace,
    check_memory,
    check_same_on_all_ranks,
    checkpoint_to_resume,
)
from yuanmoe.train.state.checkpoint import newest, read_facts
from yuanmoe.train.state.stored import Stored
from yuanmoe.train.steps.loop import Progress, Training
from yuanmoe.train.steps.meter import MeterReading, flops_per_token, read

SAMPLE_WINDOWS = 256
"""Held-out windows, spread evenly, that are measured while training goes on; all of them at its end."""


class RunObserver(Protocol):
    """Whoever looks at a run; all methods are called in the run's own thread, on every rank."""

    def began(self, run: "Run") -> None:
        """The model is made, the first step comes next."""

    def stepped(self, progress: Progress, reading: MeterReading, heldout_bits: float | None) -> None:
        """A step was taken; `heldout_bits` a byte where it was measured."""

    def said(self, message: str) -> None:
        """Something that a person should read."""

    def doing(self, what: str) -> AbstractContextManager[Any]:
        """A block that may take long."""
        ...


class QuietObserver:
    """An observer that shows nothing; a base for those that show something."""

    def began(self, run: "Run") -> None:
        """Shows nothing."""

    def stepped(self, progress: Progress, reading: MeterReading, heldout_bits: float | None) -> None:
        """Shows nothing."""

    def said(self, message: str) -> None:
        """Shows nothing."""

    def doing(self, what: str) -> AbstractContextManager[Any]:  # noqa: ARG002
        """Shows nothing."""
        return nullcontext()


class Run:
    """One training run of a model; `go` trains to the end of its budget, or until `stop` was called."""

    def __init__(self, job: TrainingJob, observer: RunObserver | None = None, *, is_claimed: bool = False) -> None:
        """`is_claimed` says that this process holds the folder already; otherwise `go` claims it."""
        self.job = job
        self.observer: RunObserver = observer or QuietObserver()
        self.training: Training | None = None
        """The steps, once the run has begun."""
        self.reading: MeterReading | None = None
        self._is_claimed = is_claimed
        self._stop = 0
        self._seconds = self._tokens = 0.0

    def stop(self, number: int = 1) -> None:
        """Ends the run after the step under way, saved; `go` then returns `number` as its signal. From any thread."""
        self._stop = number

    def go(self) -> dict[str, Any]:
        """Trains, and returns what came of it as JSON values.

        Raises TrainingError, with a saved state where there is a good one, where the run must stop, and where another
        process holds its folder.
        """
        with claimed(self.job.folder, self.job.ranks) if not self._is_claimed else nullcontext():
            return self._go()

    def _go(self) -> dict[str, Any]:
        job, heldout = self.job, self.job.data.heldout
        sample = None if heldout is None else heldout[:: len(heldout) // SAMPLE_WINDOWS + 1]
        self.training = training = Training(job.model, job.recipe, job.data.batch, sample, job.ranks)
        if job.resumed_from is not None:
            training.load(Stored(job.resumed_from), read_facts(job.resumed_from))
        self.observer.began(self)
        with Desk(job, training, self.observer.said) as desk:
            number = self._follow(training, desk)
        found: dict[str, Any] = {"interrupted": number != 0, "signal": number} | self._summary(training)
        if heldout is not None:
            with self.observer.doing("measuring on the held-out text"):
                loss = training.measure(heldout)
            found |= {} if loss is None else {"heldout_loss": loss} | bits_of(loss, job.data)
        desk.report()
        return found

    def _follow(self, training: Training, desk: Desk) -> int:
        """Every step to the end of the budget, or until any rank is stopped, whose number it returns."""
        number = 0
        try:
            for progress in training:
                self._record(progress, training, desk)
                if number := self.job.ranks.most(self._stop):
                    break
            desk.save()
        except TrainingError as error:
            raise TrainingError(f"{error}. {desk.rescue()}") from error
        desk.finish()
        return number

    def _record(self, progress: Progress, training: Training, desk: Desk) -> None:
        self._seconds += progress.step_s
        self._tokens += self.job.recipe.data.tokens_per_step
        self.reading = read(training.recent, self.job.recipe)
        bits = bits_of(progress.heldout_loss, self.job.data)
        desk.record(progress, self.reading, bits)
        self.observer.stepped(progress, self.reading, bits.get("heldout_bits_per_byte"))

    def _summary(self, training: Training) -> dict[str, Any]:
        """Of the whole run; speeds are those since it was started or resumed."""
        assert self.reading is not None, "a run has at least one step"
        last, rate = training.recent[-1], self._tokens / self._seconds
        return {
            "steps": last.step,
            "tokens": last.tokens,
            "seconds": last.elapsed_s,
            "loss": self.reading.loss,
            "tokens_per_s": rate,
            "flops_per_s": rate * flops_per_token(self.job.recipe),
            "balance": [asdict(layer) for layer in self.reading.balance],
        }


class TrainOptions(TypedDict, total=False):
    """What `train` takes beside the recipe, the data and the folder."""

    settings: Settings
    """Changed settings: `["optimizer.learning_rate=3e-4"]` or `{"optimizer.learning_rate": 3e-4}`."""
    heldout: Sequence[Path | str]
    """Datasets to measure on, beside those that `data` has."""
    tokenizer: Path | str | None
    """Of the data, where no dataset brings its own."""
    context: int | None
    """Longer windows, with the RoPE base for them."""
    accept_changes: bool
    """Go on although the recipe or the data changed."""
    overwrite: bool
    """Replace the run that is in the folder."""
    layout: str
    """Under torchrun who does what, in the words of `plan --cluster`."""
    stages: str | None
    """Layers of each stage of a pipeline, such as 2,3,3."""
    device: str | None
    """cpu or cuda; a GPU where there is one."""


def train(
    recipe: Recipe | str = "nano",
    *,
    data: Path | str | Sequence[Path | str | tuple[float, Path | str]],
    out: Path | str,
    init: Path | str | None = None,
    resume: bool = False,
    observer: RunObserver | None = None,
    **options: Unpack[TrainOptions],
) -> dict[str, Any]:
    """Trains a recipe, by its name or as an object, on datasets, and returns what came of it as JSON values.

    It does what `yuanmoe train` does, in this process: the run in the folder `out` has the same files, checkpoints and
    samples, and goes on with `resume=True`. Data may be a path, several, or pairs of a weight and a path. Raises
    UsageError and the other errors of the package before anything is learned, and TrainingError where a run must stop.
    """
    weights = None if init is None else open_checkpoint(init)
    config = None if weights is None else weights.config
    made = named(recipe) if isinstance(recipe, str) else recipe
    made = resolve(made, config, context=options.get("context"), settings=options.get("settings", ()))
    check_has_base(made, config)
    chosen = layout_of(options.get("layout", ""), world_size(), made, options.get("stages"))
    place = RunPlace(
        folder=Path(out),
        resume=resume,
        overwrite=options.get("overwrite", False),
        accept_changes=options.get("accept_changes", False),
    )
    device, shown = local_device(options.get("device")), observer or QuietObserver()
    tokenizer = options.get("tokenizer")
    opened = open_data(
        _places(data),
        made,
        heldout=[Path(path) for path in options.get("heldout", ())],
        tokenizer=None if tokenizer is None else Path(tokenizer),
        model=weights,
    )
    with joined(chosen, made.model, device) as ranks:
        found = _train(place, made, chosen, weights, opened, device, ranks, shown)
    return found | {"checkpoint": str(newest(place.folder / CHECKPOINTS)), "report": str(place.folder / "report.html")}


@contextmanager
def claimed(folder: Path, ranks: Ranks) -> Iterator[None]:
    """A block in which the processes of this run alone hold its folder; where rank 0 cannot, all ranks raise."""
    claim, failed = claimed_run(folder) if ranks.leads else nullcontext(), None
    try:
        claim.__enter__()
    except TrainingError as error:
        failed = error
    if refused := ranks.all(failed)[0]:
        raise refused
    try:
        yield
    finally:
        claim.__exit__(None, None, None)


def _train(
    place: RunPlace,
    recipe: Recipe,
    layout: Layout,
    weights: OpenCheckpoint | None,
    opened: TrainingData,
    device: torch.device,
    ranks: Ranks,
    observer: RunObserver,
) -> dict[str, Any]:
    check_same_on_all_ranks(recipe, opened.identity, ranks)
    check_memory(recipe, weights, device.type, ranks)
    if place.resume:
        newest(place.folder / CHECKPOINTS)
    with claimed(place.folder, ranks):
        checkpoint = checkpoint_to_resume(place, recipe, opened.identity, ranks, observer.said)
        with observer.doing("making the model"):
            job = _job(place, recipe, laid_out(recipe, layout), weights, opened, checkpoint, device, ranks)
        return Run(job, observer, is_claimed=True).go()


def _job(
    place: RunPlace,
    recipe: Recipe,
    computed: Recipe,
    weights: OpenCheckpoint | None,
    opened: TrainingData,
    checkpoint: Path | None,
    device: torch.device,
    ranks: Ranks,
) -> TrainingJob:
    """The run, with the model that it begins or goes on with."""
    origin, base = Origin(), None
    source = weights if recipe.lora or checkpoint is None else open_checkpoint(checkpoint)
    if source is None:
        model = new_model(computed, device)
    elif recipe.lora:
        model, base = adapted_model(computed, source, device, checkpoint)
    else:
        model, origin = loaded_model(computed, source, device), source.origin
    return TrainingJob(
        model=sharded(model, ranks),
        recipe=computed,
        data=opened,
        folder=place.folder,
        origin=origin,
        base=base,
        resumed_from=checkpoint,
        ranks=ranks,
        named=recipe,
    )


def _places(data: Path | str | Sequence[Path | str | tuple[float, Path | str]]) -> list[tuple[float, Path]]:
    listed = [data] if isinstance(data, str | os.PathLike) else data
    return [(each[0], Path(each[1])) if isinstance(each, tuple) else (1.0, Path(each)) for each in listed]
