"""Everything that a run writes to while it goes: its folder, curves, samples, checkpoints, report."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from yuanmoe.checkpoint.adapters.adapter import Base, adapter_of
from yuanmoe.checkpoint.formats.native_config import Origin, parse_dtype
from yuanmoe.errors import TrainingError
from yuanmoe.lm import LanguageModel
from yuanmoe.model.decoder import CausalLM
from yuanmoe.reports.training_page import write_run_page
from yuanmoe.storage.run_folder import RunFolder
from yuanmoe.text.tokenizer import load_tokenizer
from yuanmoe.train.board import Board
from yuanmoe.train.parallel.ranks import ALONE, Ranks
from yuanmoe.train.parallel.shard import ready_to_use
from yuanmoe.train.recipe.recipe import Recipe
from yuanmoe.train.start.data import TrainingData
from yuanmoe.train.start.place import CHECKPOINTS
from yuanmoe.train.state.checkpoint import Checkpoints, Snapshot, adapter_snapshot, not_finite, snapshot, steps
from yuanmoe.train.steps.guard import spoiled
from yuanmoe.train.steps.loop import Progress, Training
from yuanmoe.train.steps.meter import MeterReading, bits_per_byte, metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJob:
    """A model, what it learns from, and where the run is written."""

    model: CausalLM
    """Trained in place."""
    recipe: Recipe
    """As it is computed here."""
    data: TrainingData
    folder: Path
    origin: Origin = field(default_factory=Origin)
    """Of the weights it started from."""
    base: Base | None = None
    """What a run of LoRA adapts; its checkpoints are adapters."""
    keeps: bool = True
    """Whether the run is saved on its way, and writes curves for TensorBoard."""
    resumed_from: Path | None = None
    """The checkpoint to go on from; the model has its weights already."""
    ranks: Ranks = ALONE
    """All of them run this; rank 0 shows, logs and writes."""
    named: Recipe | None = None
    """The recipe that names the run, where a layout changed how it is computed."""

    @property
    def identity(self) -> dict[str, Any]:
        """What a run goes on with."""
        return {"recipe": (self.named or self.recipe).to_dict(), "data": self.data.identity}


class Desk(ExitStack):
    """What one run writes; a context manager, which waits at its end for what is being written."""

    def __init__(self, job: TrainingJob, training: Training, say: Callable[[str], None]) -> None:
        super().__init__()
        self._job, self._training, self._say = job, training, say
        self._resumed_at = training.step if job.resumed_from else None
        self._tokenizer = load_tokenizer(job.data.tokenizer) if job.recipe.run.prompts else None

    def __enter__(self) -> "Desk":
        super().__enter__()
        job, at = self._job, self._resumed_at
        self._run = self._board = None
        if job.ranks.leads:
            recipe = job.identity["recipe"]
            self._run = self.enter_context(RunFolder(job.folder, recipe, resumed_at=at, say=self._say))
            self._board = self.enter_context(Board(job.folder, self._say, resumed_at=at)) if job.keeps else None
        self._checkpoints = self.enter_context(self._open_checkpoints()) if job.keeps else None
        return self

    def record(self, progress: Progress, reading: MeterReading, bits: dict[str, float]) -> None:
        """Writes what a step came to, and saves where it is time to."""
        line = metrics(progress, reading) | bits
        if self._run is not None:
            self._run.log(line)
        if self._board is not None:
            self._board.log(progress.step, _curves(line))
        if progress.milestone is not None:
            self._write_samples(progress.step)
            self.report()
        every = self._job.recipe.run.checkpoint_steps
        if progress.milestone is not None or (every and progress.step % every == 0):
            self.save()

    def report(self) -> None:
        """Writes the report; a disk that fails costs the report alone."""
        if not self._job.ranks.leads:
            return
        try:
            write_run_page(self._job.folder)
        except OSError as error:
            self._say(f"the report was not written: {error}")

    def save(self) -> None:
        """Begins a checkpoint. Raises TrainingError, on all ranks, for a state that is not finite."""
        if self._checkpoints is None:
            return
        taken = self._snapshot(self._training.facts() | self._job.identity)
        bad = next(filter(None, self._job.ranks.all(not_finite(taken))), "")
        if bad:
            self._training.is_sound = False
            raise spoiled(taken.step, f"{bad} holds numbers that are not finite")
        self._checkpoints.save(taken)

    def finish(self) -> None:
        """Waits for the last checkpoint; raises what its writing raised."""
        if self._checkpoints is not None:
            self._checkpoints.finish()

    def rescue(self) -> str:
        """Saves the state before a step that was not taken, where it is good, and says where to go on from."""
        if self._training.step == 0:
            return "Nothing was learned that could be saved"
        if self._checkpoints is None:
            return "This run is not saved"
        if self._training.is_sound:
            try:
                self.save()
                return f"The state before it is saved in {self._checkpoints.finish()}; --resume goes on from there"
            except TrainingError as error:
                return f"{error}. {self._last_good()}"
        return self._last_good()

    def _last_good(self) -> str:
        if self._checkpoints is not None:
            self._checkpoints.settle()
        kept = steps(self._job.folder / CHECKPOINTS)
        return f"The last good checkpoint is step-{kept[-1]}; --resume goes on from there" if kept else "None was saved"

    def _write_samples(self, step: int) -> None:
        """What the model makes of the recipe's prompts now, always its likeliest tokens."""
        if self._tokenizer is None:
            return
        with ready_to_use(self._job.model, self._job.ranks) as model:
            if model is not None:
                self._sample(LanguageModel(model, self._tokenizer), step)

    def _sample(self, lm: LanguageModel, step: int) -> None:
        run, room = self._job.recipe.run, self._job.recipe.model.max_position_embeddings
        for prompt in run.prompts:
            ids = lm.text_ids(prompt)
            new_tokens = min(run.sample_tokens, room - len(ids))
            if new_tokens > 0 and self._run is not None:
                text = lm.generate(ids, max_new_tokens=new_tokens).text
                self._run.sample({"step": step, "prompt": prompt, "text": text})

    def _open_checkpoints(self) -> Checkpoints:
        keep_last, folder = self._job.recipe.run.keep_last, self._job.folder / CHECKPOINTS
        # The tokenizer of an adapter is its base's.
        companions = self._job.data.tokenizer if self._job.base is None else None
        return Checkpoints(folder, keep_last=keep_last, companions=companions, say=self._say, ranks=self._job.ranks)

    def _snapshot(self, facts: dict[str, Any]) -> Snapshot:
        job, tensors = self._job, self._training.tensors()
        if job.recipe.lora is None or job.base is None:
            dtype = parse_dtype(job.recipe.run.dtype)
            return snapshot(job.model, tensors, facts, job.origin, job.ranks, dtype)
        return adapter_snapshot(adapter_of(job.model, job.recipe.lora, job.base), tensors, facts)


def bits_of(loss: float | None, data: TrainingData) -> dict[str, float]:
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
