"""One training run from the command line: shown while it goes, written to its folder and saved.

Its budget ends it, or a signal, or a loss that must not be learned from.

Importing this file imports torch.
"""

import signal
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from yuanmoe.checkpoint.adapters.adapter import Base, adapter_of
from yuanmoe.checkpoint.formats.native_config import Origin, parse_dtype
from yuanmoe.cli.doctor.probe import matmul_rate
from yuanmoe.cli.terminal.interrupt import Interrupt
from yuanmoe.cli.train.view import TrainingView
from yuanmoe.errors import TrainingError
from yuanmoe.lm import LanguageModel
from yuanmoe.model.decoder import CausalLM
from yuanmoe.reports.training_page import write_run_page
from yuanmoe.storage.run_folder import RunFolder
from yuanmoe.text.tokenizer import load_tokenizer
from yuanmoe.train.board import Board
from yuanmoe.train.parallel.ranks import ALONE, Ranks
from yuanmoe.train.parallel.shard import ready_to_use
from yuanmoe.train.parallel.stages import state_dtype
from yuanmoe.train.recipe.recipe import Recipe
from yuanmoe.train.start.data import TrainingData
from yuanmoe.train.state.checkpoint import Checkpoints, Snapshot, adapter_snapshot, read_facts, snapshot, steps
from yuanmoe.train.state.stored import Stored
from yuanmoe.train.steps.loop import Progress, Training
from yuanmoe.train.steps.meter import MeterReading, bits_per_byte, flops_per_token, metrics, read

SAMPLE_WINDOWS = 256
"""Held-out windows, spread evenly, that are measured while training goes on; all of them at its end."""
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJob:
    """A run and its surroundings."""

    model: CausalLM
    """Trained in place."""
    recipe: Recipe
    """As it is computed here."""
    data: TrainingData
    folder: Path
    console: Console
    origin: Origin = field(default_factory=Origin)
    """Of the weights it started from."""
    base: Base | None = None
    """What a run of LoRA adapts; its checkpoints are adapters."""
    keeps: bool = True
    """Whether the run is saved on its way, and writes curves for TensorBoard."""
    resumed_from: Path | None = None
    """The checkpoint to go on from; the model has its weights already."""
    ranks: Ranks = ALONE
    """All of them run this; the leading one shows, logs and writes."""
    named: Recipe | None = None
    """The recipe that names the run, where a layout changed how it is computed."""

    @property
    def identity(self) -> dict[str, Any]:
        """What a run goes on with."""
        return {"recipe": (self.named or self.recipe).to_dict(), "data": self.data.identity}


def run_training(job: TrainingJob) -> dict[str, Any]:
    """Trains, and says what came of it as JSON values. Raises TrainingError with a saved state where it must stop."""
    weight, heldout = next(job.model.parameters()), job.data.heldout
    with job.console.status("measuring this machine's matrix products"):
        dtype = parse_dtype(job.recipe.run.dtype) if job.recipe.lora is None else state_dtype(job.model)
        peak = matmul_rate(weight.device, dtype, size=1024).high * job.ranks.size
    sample = None if heldout is None else heldout[:: len(heldout) // SAMPLE_WINDOWS + 1]
    training = Training(job.model, job.recipe, job.data.batch, sample, job.ranks)
    if job.resumed_from is not None:
        training.load(Stored(job.resumed_from), read_facts(job.resumed_from))
    with _Desk(job, training, peak) as desk:
        number = desk.follow()
    found: dict[str, Any] = {"interrupted": number != 0, "signal": number} | desk.summary(peak)
    if heldout is not None:
        with job.console.status("measuring on the held-out text"):
            loss = training.measure(heldout)
        found |= {} if loss is None else {"heldout_loss": loss} | _bits(loss, job.data)
    if job.ranks.leads:
        write_run_page(job.folder)
    return found


class _Desk(ExitStack):
    """Everything that a run writes to while it goes."""

    def __init__(self, job: TrainingJob, training: Training, peak: float) -> None:
        super().__init__()
        self.job, self.training = job, training
        self.reading: MeterReading | None = None
        self._resumed_at = training.step if job.resumed_from else None
        hint = "Ctrl-C saves and stops" if job.keeps else "Ctrl-C ends it sooner"
        self._view = TrainingView(console=job.console, peak_flops=peak, hint=hint)
        self._tokenizer = load_tokenizer(job.data.tokenizer) if job.recipe.run.prompts else None
        self._seconds = self._tokens = 0.0

    def __enter__(self) -> "_Desk":
        super().__enter__()
        job, at = self.job, self._resumed_at
        self._run = self._board = None
        if job.ranks.leads:
            self._run = self.enter_context(RunFolder(job.folder, job.identity["recipe"], resumed_at=at))
            self._board = self.enter_context(Board(job.folder, self._say, resumed_at=at)) if job.keeps else None
        self._checkpoints = self.enter_context(self._open_checkpoints()) if job.keeps else None
        self.enter_context(self._view)
        self._interrupt = self.enter_context(Interrupt((signal.SIGINT, signal.SIGTERM)))
        return self

    def follow(self) -> int:
        """Every step to the end of the budget, or to a signal to any rank, whose number it returns."""
        self._interrupt.graceful = True
        number = 0
        try:
            for progress in self.training:
                self._record(progress)
                if number := self.job.ranks.most(self._interrupt.number):
                    break
        except TrainingError as error:
            raise TrainingError(f"{error}. {self._rescue()}") from error
        self._save()
        if self._checkpoints is not None:
            self._checkpoints.finish()
        return number

    def summary(self, peak: float) -> dict[str, Any]:
        """Of the whole run; speeds are those since it was started or resumed."""
        assert self.reading is not None, "a run has at least one step"
        last, rate = self.training.recent[-1], self._tokens / self._seconds
        return {
            "steps": last.step,
            "tokens": last.tokens,
            "seconds": last.elapsed_s,
            "loss": self.reading.loss,
            "tokens_per_s": rate,
            "flops_per_s": rate * flops_per_token(self.job.recipe),
            "peak_flops_per_s": peak,
            "balance": [asdict(layer) for layer in self.reading.balance],
        }

    def _record(self, progress: Progress) -> None:
        recipe = self.job.recipe
        self._seconds += progress.step_s
        self._tokens += recipe.data.tokens_per_step
        self.reading = read(self.training.recent, recipe)
        bits = _bits(progress.heldout_loss, self.job.data)
        line = metrics(progress, self.reading) | bits
        if self._run is not None:
            self._run.log(line)
        if self._board is not None:
            self._board.log(progress.step, _curves(line))
        self._view.show(progress, self.reading, bits.get("heldout_bits_per_byte"))
        every = recipe.run.checkpoint_steps
        if progress.milestone is not None:
            self._write_samples(progress.step)
            if self.job.ranks.leads:
                write_run_page(self.job.folder)
        if progress.milestone is not None or (every and progress.step % every == 0):
            self._save()

    def _write_samples(self, step: int) -> None:
        """What the model makes of the recipe's prompts now, always its likeliest tokens."""
        if self._tokenizer is None:
            return
        with ready_to_use(self.job.model, self.job.ranks) as model:
            if model is not None:
                self._sample(LanguageModel(model, self._tokenizer), step)

    def _sample(self, lm: LanguageModel, step: int) -> None:
        run, room = self.job.recipe.run, self.job.recipe.model.max_position_embeddings
        for prompt in run.prompts:
            ids = lm.text_ids(prompt)
            new_tokens = min(run.sample_tokens, room - len(ids))
            if new_tokens > 0:
                text = lm.generate(ids, max_new_tokens=new_tokens).text
                if self._run is not None:
                    self._run.sample({"step": step, "prompt": prompt, "text": text})

    def _open_checkpoints(self) -> Checkpoints:
        keep_last, folder = self.job.recipe.run.keep_last, self.job.folder / CHECKPOINTS
        # The tokenizer of an adapter is its base's.
        companions = self.job.data.tokenizer if self.job.base is None else None
        return Checkpoints(folder, keep_last=keep_last, companions=companions, say=self._say, ranks=self.job.ranks)

    def _save(self) -> None:
        if self._checkpoints is not None:
            self._checkpoints.save(self._snapshot(self.training.facts() | self.job.identity))

    def _snapshot(self, facts: dict[str, Any]) -> Snapshot:
        job, tensors = self.job, self.training.tensors()
        if job.recipe.lora is None or job.base is None:
            dtype = parse_dtype(job.recipe.run.dtype)
            return snapshot(job.model, tensors, facts, job.origin, job.ranks, dtype)
        return adapter_snapshot(adapter_of(job.model, job.recipe.lora, job.base), tensors, facts)

    def _rescue(self) -> str:
        """Saves the state before a step that was not taken, and says where it is."""
        if not self.training.is_sound:
            kept = steps(self.job.folder / CHECKPOINTS)
            return (
                f"The last good checkpoint is step-{kept[-1]}; --resume goes on from there"
                if kept
                else "None was saved"
            )
        if self._checkpoints is None or self.training.step == 0:
            return "Nothing was learned that could be saved" if self.training.step == 0 else "This run is not saved"
        self._save()
        return f"The state before it is saved in {self._checkpoints.finish()}; --resume goes on from there"

    def _say(self, message: str) -> None:
        self.job.console.print(f"  {message}", soft_wrap=True, markup=False)


def _bits(loss: float | None, data: TrainingData) -> dict[str, float]:
    """A held-out loss as bits a byte of text, where that is known."""
    if loss is None or data.bytes_per_token is None:
        return {}
    return {"heldout_bits_per_byte": bits_per_byte(loss, data.bytes_per_token)}


def _curves(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics that are worth a curve."""
    names = (
        "loss", "balance_loss", "gradient_norm", "learning_rate", "tokens_per_s", "heldout_loss",
        "heldout_bits_per_byte",
    )  # fmt: skip
    layers = enumerate(line["balance"])
    experts = {f"experts/{name} {place}": value for place, layer in layers for name, value in layer.items()}
    return {name: line[name] for name in names if name in line} | experts
