"""How the tokens of one forward pass see their past: the only place where tokens meet other tokens.

Everything else in a layer is arithmetic on single tokens, so the model runs on a flat list of N tokens, without
padding, and asks a `Sequences` for two things: the previous token's filter input, and attention. Training, cached
generation, the transformers shell and the paged engine each bring their own `Sequences`.
Sources: spec 1.3 (a zero stands before each convolution separately), 1.7 (documents packed into one sequence).
Legend: N tokens of the pass, B sequences, S tokens of a sequence, D channels, H heads, C head channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from yuanmoe.config import Packing
from yuanmoe.model.state.key_values import Slots
from yuanmoe.ops.attention import attend_runs

FILTER_INPUT, FILTER_HIDDEN = 0, 1
"""The two streams that LFA looks back into: its input, and the output of its first convolution."""


@runtime_checkable
class Sequences(Protocol):
    """The past of each of N tokens. `layer_idx` and `stream` name the state to look into, where there is one."""

    @property
    def positions(self) -> Tensor:
        """Position of each token for the rotary embedding, [N] int64."""
        ...

    def previous(self, x: Tensor, layer_idx: int, stream: int) -> Tensor:
        """The value of `x` [N, D] at each token's predecessor; zero where a sequence begins."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer_idx: int, dropout: float) -> Tensor:
        """Causal attention of each token to its sequence up to itself; all [N, H, C]."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredState:
    """Where a pass finds the past of its tokens and leaves its own; all indices are int64 and on the CPU."""

    keys: Sequence[Slots]
    values: Sequence[Slots]
    tails: Sequence[Sequence[Tensor]]
    """Of each layer the rows of both streams; empty without LFA."""
    past: Sequence[int]
    new: Sequence[int]
    """Tokens of each sequence, [B]."""
    table: Tensor | None
    """Its pages, int32; without it page b is that of sequence b."""
    pages: Tensor
    slots: Tensor
    """Where the keys and values of each new token go, [N]."""
    before: Tensor
    """The row of the tails that each sequence continues, [B]."""
    kept: Tensor
    kept_in: Tensor
    """New tokens that leave a tail, and the rows that they leave it in."""


@runtime_checkable
class StoredSequences(Sequences, Protocol):
    """Sequences whose past is in memory as the compiled kernels read it."""

    def stored(self) -> StoredState | None:
        """Where; None if the kernels cannot read it there."""
        ...


class WholeSequences:
    """B sequences of S tokens each, from their beginnings, with no state kept: training and scoring.

    With `documents` ([B, S] integers that change where a new document begins) `packing` says what restarts there:
    see `ModelConfig.packing`. Finding the document lengths costs one device synchronisation.
    """

    def __init__(
        self,
        batch_size: int,
        length: int,
        *,
        device: torch.device | str = "cpu",
        documents: Tensor | None = None,
        packing: Packing = "continuous",
    ) -> None:
        self._shape = (batch_size, length)
        self._positions = torch.arange(length, device=device).repeat(batch_size)
        self._runs = [length] * batch_size
        self._isolated_starts: Tensor | None = None
        if documents is None or packing == "continuous":
            return
        starts = torch.ones_like(documents, dtype=torch.bool)
        starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
        starts = starts.flatten()
        if packing in ("megatron", "isolated"):
            order = torch.arange(len(starts), device=starts.device)
            self._positions = order - torch.where(starts, order, 0).cummax(0).values
        if packing in ("hf-mask", "isolated"):
            first = starts.nonzero().flatten().tolist()
            self._runs = [stop - start for start, stop in zip(first, [*first[1:], len(starts)], strict=True)]
        if packing == "isolated":
            self._isolated_starts = starts[:, None]

    @property
    def positions(self) -> Tensor:
        return self._positions

    def previous(self, x: Tensor, layer_idx: int, stream: int) -> Tensor:  # noqa: ARG002
        rows = x.view(*self._shape, -1)
        shifted = torch.cat([torch.zeros_like(rows[:, :1]), rows[:, :-1]], dim=1).view(x.shape)
        return shifted if self._isolated_starts is None else shifted.masked_fill(self._isolated_starts, 0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer_idx: int, dropout: float) -> Tensor:  # noqa: ARG002
        return attend_runs(q, k, v, self._runs, dropout)


def documents_of(input_ids: Tensor, eod_token_id: int) -> Tensor:
    """The index of each token's document in its row, [B, S]: `<eod>` is the last token of the document it ends."""
    ends = (input_ids == eod_token_id).long()
    return ends.cumsum(dim=1) - ends
