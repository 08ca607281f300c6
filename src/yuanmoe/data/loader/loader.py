"""Windows of tokens to train on and to measure with, of shuffled documents of many sources.

Every batch is a function of the seed and its number, so that the state of a loader is one integer.

Sample n of a `Loader` is a source by its weight (`mixture.py`), an epoch of that source as a row of shuffled documents
(`stream.py`), and a window of that row; windows are in an order of chance too. A window starts where the one before it
in its row ends, whatever documents are there. So a resumed run reads what an uninterrupted one would have read, and
every world size sees the same batches. What an epoch has beyond its last whole window is left out of that epoch.
Legend: B windows (of a rank), S tokens that a window teaches (a window has S + 1: the last one is only a target).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from yuanmoe.data.loader.fim import FillInMiddle
from yuanmoe.data.loader.mixture import Mixture
from yuanmoe.data.loader.stream import DocumentPart, ShuffledStream
from yuanmoe.data.permutation import Integers, Permutation, key_of
from yuanmoe.data.prepare.finetuning import official_window_mask
from yuanmoe.data.sets.documents import Documents, check_ids
from yuanmoe.errors import DataError, UsageError

MaskRule = Literal["stored", "official"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedDocuments:
    """Documents and how often they are read."""

    documents: Documents
    weight: float = 1.0
    """Relative to those of the other sources."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Windows to learn from, on their way to tensors."""

    ids: Integers
    """[B, S + 1]: the model reads all but the last and predicts all but the first."""
    loss_mask: npt.NDArray[np.bool_]
    """[B, S]: which of the predicted tokens count."""
    documents: Integers
    """[B, S], of the tokens read: numbers that change where a document begins, for `WholeSequences(documents=...)`."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, windows: slice) -> "Batch":
        """Some of the windows."""
        return Batch(ids=self.ids[windows], loss_mask=self.loss_mask[windows], documents=self.documents[windows])

    @classmethod
    def of(cls, parts: Sequence[DocumentPart]) -> "Batch":
        """Parts of rows, all of S + 1 tokens, as windows."""
        return cls(
            ids=np.stack([part.ids for part in parts]),
            loss_mask=np.stack([part.learned[1:] for part in parts]),
            documents=np.stack([part.documents[:-1] for part in parts]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderOptions:
    """What decides the samples besides the sources."""

    length: int
    """S."""
    batch_size: int
    """Windows of one step, on all ranks together."""
    vocab_size: int
    """Of the model: rows of its embedding."""
    seed: int = 0
    fim: FillInMiddle | None = None
    """For sources without a mask."""
    mask: MaskRule = "stored"
    """`stored` beside the tokens, or `official`: the released rule, which sees no more than a window."""
    sep_id: int = -1
    eod_id: int = -1
    """Both for the official mask only."""

    def __post_init__(self) -> None:
        for name in ("length", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.mask == "official" and min(self.sep_id, self.eod_id) < 0:
            raise UsageError("the official mask needs the ids of <sep> and <eod> (sep_id, eod_id)")


class Loader:
    """Batches of one rank; an endless iterator, which stands at `samples`."""

    def __init__(
        self, sources: Sequence[WeightedDocuments], options: LoaderOptions, *, rank: int = 0, world_size: int = 1
    ) -> None:
        """Raises DataError for sources without a window or a share, UsageError where ranks do not divide a batch."""
        if not 0 <= rank < world_size or options.batch_size % world_size:
            raise UsageError(
                f"rank {rank} of {world_size} has no equal part of batches of {options.batch_size} windows; choose a "
                "batch size that the number of ranks divides"
            )
        self._sources, self._options, self._rank = tuple(sources), options, rank
        self._local = options.batch_size // world_size
        self._windows = np.array([_windows_per_epoch(source, options.length) for source in sources])
        self.mixture = Mixture([source.weight for source in sources], seed=options.seed)
        self.samples = 0
        """Windows read so far, by all ranks together."""
        # Two of each source: a batch may lie across the end of an epoch.
        self._epoch = lru_cache(maxsize=2 * len(self._sources))(self._shuffled)

    def batch(self, number: int) -> Batch:
        """This rank's part of the batch of that number, from 0, whatever was read before."""
        return self.windows_from(number * self._options.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self.windows_from(self.samples)
        self.samples += self._options.batch_size
        return batch

    def epochs(self, samples: int) -> list[float]:
        """How often each source is read through in that many samples."""
        shares = zip(self.mixture.shares, self._windows, strict=True)
        return [float(samples * share / windows) for share, windows in shares]

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands and what it reads, as JSON values; the same on every rank."""
        return {"samples": self.samples, "reads": self._reads()}

    def load_state_dict(self, state: Mapping[str, Any], *, accept_changes: bool = False) -> None:
        """Go on where `state` was taken. Raises DataError, unless `accept_changes`, where other samples would follow.

        The world size and the batch size may differ: samples go on one by one.
        """
        before, now = state["reads"], self._reads()
        changed = [name for name in now if before.get(name) != now[name]]
        if changed and not accept_changes:
            told = "; ".join(f"{name} was {before.get(name)}, is {now[name]}" for name in changed)
            raise DataError(f"the data changed since the state was saved ({told}); restore it, or accept the change")
        self.samples = int(state["samples"])

    def _reads(self) -> dict[str, Any]:
        options = asdict(self._options)
        del options["batch_size"], options["vocab_size"]
        sources = [(source.documents, source.weight) for source in self._sources]
        return options | {"sources": [[tokens.fingerprint[:16], weight] for tokens, weight in sources]}

    def windows_from(self, first: int) -> Batch:
        """This rank's windows of the batch that begins with sample `first`."""
        start = first + self._rank * self._local
        sources, within = self.mixture.turns(np.arange(start, start + self._local))
        epochs, places = np.divmod(within, self._windows[sources])
        found: dict[int, DocumentPart] = {}
        for source, epoch in sorted(set(zip(sources.tolist(), epochs.tolist(), strict=True))):
            here = np.flatnonzero((sources == source) & (epochs == epoch))
            found |= zip(here.tolist(), self._parts(source, epoch, places[here]), strict=True)
        batch = Batch.of([found[place] for place in range(self._local)])
        if self._options.mask != "official":
            return batch
        ids = {"sep_id": self._options.sep_id, "eod_id": self._options.eod_id}
        return replace(batch, loss_mask=official_window_mask(batch.ids[:, 1:], **ids))

    def _parts(self, source: int, epoch: int, places: Integers) -> Iterator[DocumentPart]:
        """The windows of a source at `places` of the order of an epoch."""
        stream, order = self._epoch(source, epoch)
        for first in (order(places) * self._options.length).tolist():
            part = stream.read(first, first + self._options.length + 1)
            check_ids(part.ids, self._options.vocab_size, self._sources[source].documents.name)
            yield part

    def _shuffled(self, source: int, epoch: int) -> tuple[ShuffledStream, Permutation]:
        """The row of documents of an epoch, and the order of its windows."""
        seed, documents = self._options.seed, self._sources[source].documents
        masked = documents.mask(0, 0, 0) is not None
        stream = ShuffledStream(
            documents,
            key=key_of("documents", seed, source, epoch),
            fim=None if masked else self._options.fim,
            span=self._options.length,
        )
        return stream, Permutation(int(self._windows[source]), key_of("windows", seed, source, epoch))


def measuring_windows(documents: Documents, *, length: int, limit: int) -> Batch:
    """Up to `limit` windows to measure a loss with: the same ones for every seed; a rest shorter than one is left out.

    Raises DataError when there is no window.
    """
    count = min(_windows_per_epoch(WeightedDocuments(documents=documents), length), limit)
    row = ShuffledStream(documents, key=key_of("measure"), fim=None, span=length)
    return Batch.of([row.read(place * length, (place + 1) * length + 1) for place in range(count)])


def _windows_per_epoch(source: WeightedDocuments, length: int) -> int:
    windows = (source.documents.num_tokens - 1) // length
    if windows < 1:
        raise DataError(
            f"{source.documents.name} has {source.documents.num_tokens} tokens, a window takes {length + 1}; give more "
            "text, or a smaller length"
        )
    return windows
