"""What a run goes on from: a native checkpoint that any command loads, with the state of the training beside it.

`checkpoints/step-N/` holds config.json, model.safetensors and the tokenizer as every native directory, and

| file | holds |
|---|---|
| training.safetensors | float32 masters of bfloat16 weights, AdamW's moments, sums of router biases |
| training-K-of-N.safetensors | the same in pieces, where N ranks hold them (`stored.py`) |
| training.json | step, time, schedule, the last steps, held-out losses, the recipe and what names the data |

A run of LoRA holds its adapter there, as `checkpoint/adapters/adapter.py` writes it, and nothing of the base.

A save copies everything to memory and returns; a thread writes it beside, flushes it and renames it, and the next save
waits for it. Of several ranks each writes its piece into `step-N.pieces`; when all are whole the leading rank writes
the rest beside, moves them in, and renames. Generators and the loader have no state: what is random in a step follows
from its number (`loop.py`).
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from yuanmoe.checkpoint.adapters import adapter as adapters
from yuanmoe.checkpoint.adapters.adapter import Adapter
from yuanmoe.checkpoint.files.lazy import TensorView, main_dtype
from yuanmoe.checkpoint.files.safetensors_file import write_safetensors
from yuanmoe.checkpoint.formats.native_config import Origin, native_config
from yuanmoe.checkpoint.write.save import COMPANIONS
from yuanmoe.checkpoint.write.writer import Contents, silent, write_checkpoint
from yuanmoe.errors import CheckpointError, YuanError
from yuanmoe.model.decoder import CausalLM
from yuanmoe.storage.folder import disk_errors
from yuanmoe.storage.json_file import read_json
from yuanmoe.train.parallel.ranks import ALONE, Ranks, new_group
from yuanmoe.train.parallel.shard import whole_weights
from yuanmoe.train.state.stored import TENSORS, check_whole, piece_name

FACTS = "training.json"
PREFIX = "step-"
_DROPPED, _PIECES = ".dropped", ".pieces"
WRITING = timedelta(hours=1)
"""What ranks wait for one another's pieces, and for the leading rank to write all weights."""

Entry = dict[str, Any]
"""What a manifest says of a file."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A run between two steps, copied to memory."""

    step: int
    config: dict[str, Any]
    """Of the model, as config.json."""
    weights: dict[str, Tensor]
    """Nothing on ranks that do not lead."""
    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    is_adapter: bool = False
    """Whether config and weights are an adapter's."""


def adapter_snapshot(adapter: Adapter, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Snapshot:
    """The same of a run that adapts a base."""
    return Snapshot(
        step=facts["step"],
        config=adapters.described(adapter),
        weights={name: _copied(tensor) for name, tensor in adapter.tensors.items()},
        tensors={name: _copied(tensor) for name, tensor in tensors.items()},
        facts=_plain(facts),
        is_adapter=True,
    )


def snapshot(
    model: CausalLM,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    origin: Origin,
    ranks: Ranks = ALONE,
    dtype: torch.dtype = torch.float32,
) -> Snapshot:
    """Copies the weights of `model` and `tensors`, so that training may go on; `facts` are JSON values with a step.

    `dtype` is that of the weights where only their float32 masters are kept. All ranks take part.
    """
    weights = whole_weights(model, ranks, dtype)
    views = {name: TensorView.of(tensor) for name, tensor in weights.items()}
    return Snapshot(
        step=facts["step"],
        config=native_config(model.config, main_dtype(views), origin) if ranks.leads else {},
        weights=weights,
        tensors={name: _copied(tensor) for name, tensor in tensors.items()},
        facts=_plain(facts),
    )


def _plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of JSON values."""
    return json.loads(json.dumps(facts, allow_nan=False))


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def write_snapshot(
    taken: Snapshot, dst: Path, companions: Path | None, pieces: Mapping[Path, Entry] | None = None
) -> None:
    """Writes a snapshot as `dst`, with the tokenizer in the folder `companions`: whole or not at all.

    `pieces` of the training state that are written already move in instead of the snapshot's tensors.

    Raises ResourceError when the disk is full and CheckpointError when it fails otherwise.
    """
    copies = [companions / name for name in COMPANIONS if (companions / name).is_file()] if companions else []
    weights, state = (
        {name: TensorView.of(tensor) for name, tensor in tensors.items()} for tensors in (taken.weights, taken.tensors)
    )
    contents = Contents(
        tensors={} if taken.is_adapter else weights,
        config=taken.config,
        copies=copies,
        extras=lambda _: {FACTS: taken.facts},
        beside=({} if pieces else {TENSORS: state}) | ({adapters.TENSORS: weights} if taken.is_adapter else {}),
        moved=pieces or {},
    )
    write_checkpoint(dst, contents, say=silent)


def read_facts(path: Path) -> dict[str, Any]:
    """The JSON values of a checkpoint that training wrote. Raises CheckpointError for another one."""
    if not (path / FACTS).is_file():
        raise CheckpointError(f"{path} has no {FACTS}: no training run wrote it. To start from its weights: --init")
    return read_json(path / FACTS)


class Checkpoints:
    """The checkpoints of one run: the newest `keep_last`, and the one with the lowest held-out loss.

    A context manager, which waits at its end for what is being written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int,
        companions: Path | None = None,
        say: Callable[[str], None] = _LOG.warning,
        ranks: Ranks = ALONE,
    ) -> None:
        """Clears away what a killed run left half written or half removed. `say` hears of saves that failed.

        All ranks make one, and save at the same steps.
        """
        self._folder, self._keep_last, self._companions, self._say = folder, keep_last, companions, say
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._ranks = ranks
        # Threads of all ranks agree beside the training itself, so on a group of their own.
        self._group = None if ranks.everyone is None else new_group(backend="gloo", timeout=WRITING)
        folder.mkdir(parents=True, exist_ok=True)
        if ranks.leads:
            for suffix in (".partial", _DROPPED, _PIECES):
                for rest in folder.glob(f"{PREFIX}*{suffix}"):
                    shutil.rmtree(rest)
        ranks.wait()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()

    def save(self, taken: Snapshot) -> None:
        """Begins to write a snapshot once the one before it is written; a failure is said, and training may go on."""
        self.settle()
        self._writing = self._thread.submit(self._write, taken)

    def finish(self) -> Path:
        """Waits for the last save; its place. Raises what it raised."""
        assert self._writing is not None, "something was saved"
        self._writing.result()
        return newest(self._folder)

    def settle(self) -> None:
        """Waits for the save under way."""
        if self._writing is None:
            return
        try:
            self._writing.result()
        except YuanError as error:
            kept = steps(self._folder)
            last = f"the last good one is {PREFIX}{kept[-1]}" if kept else "there is none yet"
            self._say(f"a checkpoint was not written: {error}; {last}. Training goes on and tries again at the next")

    def _write(self, taken: Snapshot) -> None:
        place = self._place(taken.step)
        if self._agree(place.exists()):
            return
        beside = place.with_name(place.name + _PIECES)
        try:
            self._publish(taken, place, self._pieces(taken, beside))
        except YuanError:
            # What is half written could not be gone on with, and takes room.
            if self._ranks.leads:
                for rest in (place.with_name(place.name + ".partial"), beside):
                    shutil.rmtree(rest, ignore_errors=True)
            raise

    def _pieces(self, taken: Snapshot, beside: Path) -> dict[Path, Entry]:
        """The pieces of all ranks, once they are whole in the folder `beside`; none where the leading rank has all.

        Raises what a rank raised, on all ranks.
        """
        if not self._ranks.shares_state:
            return {}
        with self._together(), disk_errors(beside):
            beside.mkdir(exist_ok=True)
            path = beside / piece_name(self._ranks.rank, self._ranks.size)
            digest = write_safetensors(path, {key: TensorView.of(tensor) for key, tensor in taken.tensors.items()})
            entry = {"bytes": path.stat().st_size, "sha256": digest}
        return dict(self._ranks.all((path, entry), self._group))

    def _publish(self, taken: Snapshot, place: Path, pieces: Mapping[Path, Entry]) -> None:
        """The leading rank makes the checkpoint of the pieces and the rest, and drops what has become surplus."""
        with self._together():
            if self._ranks.leads:
                write_snapshot(taken, place, self._companions, pieces)
                shutil.rmtree(place.with_name(place.name + _PIECES), ignore_errors=True)
                self._drop_surplus()

    @contextmanager
    def _together(self) -> Iterator[None]:
        """A block of all ranks that fails on all of them where it fails on one."""
        failed: YuanError | None = None
        try:
            yield
        except YuanError as error:
            failed = error
        errors = [error for error in self._ranks.all(failed, self._group) if error is not None]
        if errors:
            raise errors[0]

    def _agree(self, is_there: bool) -> bool:
        return self._ranks.all(is_there, self._group)[0]

    def _drop_surplus(self) -> None:
        for step in surplus({step: read_facts(self._place(step)) for step in steps(self._folder)}, self._keep_last):
            dropped = self._place(step).with_name(f"{PREFIX}{step}{_DROPPED}")
            self._place(step).rename(dropped)
            shutil.rmtree(dropped)

    def _place(self, step: int) -> Path:
        return self._folder / f"{PREFIX}{step}"


def newest_whole(folder: Path) -> Path:
    """The last checkpoint of a run, once its files are found to be what was written.

    Raises CheckpointError where there is none, or where it is damaged: the message names the newest that is not.
    """
    found = newest(folder)
    try:
        read_facts(found)
        check_whole(found)
    except CheckpointError as error:
        whole = next((step for step in reversed(steps(folder)[:-1]) if _is_whole(folder / f"{PREFIX}{step}")), None)
        way_out = (
            f"{PREFIX}{whole} is whole: move {found} away, and the same command goes on from step {whole}"
            if whole is not None
            else "no other checkpoint of this run is whole: start over with --overwrite"
        )
        raise CheckpointError(f"{error}. {way_out}") from error
    return found


def _is_whole(path: Path) -> bool:
    try:
        read_facts(path)
        check_whole(path)
    except CheckpointError:
        return False
    return True


def not_finite(taken: Snapshot) -> str:
    """A tensor of a snapshot that holds something other than finite numbers; empty where there is none."""
    tensors = {**taken.weights, **taken.tensors}
    bad = (name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all())
    return next(bad, "")


def surplus(facts: Mapping[int, Mapping[str, Any]], keep_last: int) -> list[int]:
    """The steps whose checkpoints can go, given what each says."""
    newest_steps = sorted(facts)[-keep_last:]
    measured = {step: fact["heldout_loss"] for step, fact in facts.items() if fact.get("heldout_loss") is not None}
    best = min(measured, key=lambda step: measured[step]) if measured else None
    return [step for step in sorted(facts) if step not in newest_steps and step != best]


def steps(folder: Path) -> list[int]:
    """The steps of the whole checkpoints in a run's folder, ascending."""
    names = [path.name.removeprefix(PREFIX) for path in folder.glob(f"{PREFIX}*")]
    return sorted(int(name) for name in names if name.isdigit())


def newest(folder: Path) -> Path:
    """The last checkpoint of a run. Raises CheckpointError where there is none."""
    found = steps(folder)
    if not found:
        raise CheckpointError(f"{folder} holds no checkpoint to go on from; start the run without --resume")
    return folder / f"{PREFIX}{found[-1]}"
