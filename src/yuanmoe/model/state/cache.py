"""What generation remembers of each sequence: keys, values, and the LFA tail of every layer.

The tail is the last filter input and the last output of the first convolution, both zero when a sequence is empty,
which is exact (spec 1.3); so a prompt may be cut into chunks anywhere. A key's slot is its position: padding is never
stored, sequences of any lengths share a cache, and each computes what it would compute alone.
Legend: N new tokens of the pass, B sequences, T slots, D hidden, H heads, C head channels.
"""

import torch
from torch import Tensor

from yuanmoe.config import ModelConfig
from yuanmoe.errors import ContextLengthError
from yuanmoe.model.state.key_values import Slots, attend
from yuanmoe.model.state.sequences import StoredState


class Cache:
    """Room for `batch_size` sequences of up to `capacity` tokens, taken at once (touched only as it fills).

    Tails [B, D] and [B, D / 2] of a layer have `dtype`; keys and values `kv_dtype`, the same unless given. Raises
    ContextLengthError when `capacity` exceeds the model's context.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        kv_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if capacity > config.max_position_embeddings:
            raise ContextLengthError(
                f"{capacity} tokens do not fit the model's context of {config.max_position_embeddings} "
                "(max_position_embeddings); shorten the prompt or ask for fewer new tokens"
            )
        slots = (batch_size, config.num_attention_heads, capacity, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [Slots(slots, kv_dtype or dtype, device) for _ in layers]
        self.values = [Slots(slots, kv_dtype or dtype, device) for _ in layers]
        widths = (config.hidden_size, config.hidden_size // 2) if config.localized_filtering else ()
        self.tails = [[torch.zeros(batch_size, D, dtype=dtype, device=device) for D in widths] for _ in layers]
        self.lengths = [0] * batch_size
        self.capacity = capacity
        self.device = device

    def extend(self, new_tokens: list[int]) -> "CachedSequences":
        """The sequences of the next pass, `new_tokens` of each; they count as stored from now on.

        The pass must follow: it fills the slots. Raises ContextLengthError when a sequence outgrows its room.
        """
        past = list(self.lengths)
        for row, (before, new) in enumerate(zip(past, new_tokens, strict=True)):
            if before + new > self.capacity:
                raise ContextLengthError(
                    f"sequence {row} would have {before + new} tokens; the cache was made for {self.capacity}"
                )
        self.lengths = [before + new for before, new in zip(past, new_tokens, strict=True)]
        return CachedSequences(self, past, new_tokens)

    def select(self, rows: list[int]) -> None:
        """Keeps the given sequences, in this order; a row may be named more than once (beams, several samples)."""
        index = torch.tensor(rows, device=self.device)
        for slots in (*self.keys, *self.values):
            slots.select(index, max(self.lengths))
        self.tails = [[tail[index] for tail in tails] for tails in self.tails]
        self.lengths = [self.lengths[row] for row in rows]


class CachedSequences:
    """The new tokens of each sequence of a cache, flat and in row order, seeing all that the cache holds of them."""

    def __init__(self, cache: Cache, past: list[int], new_tokens: list[int]) -> None:
        B = len(new_tokens)
        self._cache, self._past, self._new = cache, past, new_tokens
        assert any(new_tokens), "a pass without new tokens"
        counts = torch.tensor(new_tokens)
        ends = counts.cumsum(0)
        starts = ends - counts
        rows = torch.arange(B).repeat_interleave(counts)
        order = torch.arange(len(rows))
        first = order == starts[rows]
        # Indices into [tails of B sequences; N new tokens]: a first token's predecessor is its sequence's tail.
        predecessor = torch.where(first, rows, order + B - 1)
        tail = torch.where(counts > 0, ends + B - 1, torch.arange(B))
        positions = order - starts[rows] + torch.tensor(past)[rows]
        # One transfer for all: on a GPU each costs as much as a small kernel.
        kept_in = counts.nonzero().squeeze(1)
        parts = (predecessor, rows, positions, tail, kept_in, ends[kept_in] - 1, torch.arange(B), ends - 1)
        on_device = torch.cat(parts).to(cache.device).split([len(part) for part in parts])
        self._predecessor, self._rows, self._positions, self._tail = on_device[:4]
        self._kept_in, self._kept, self._before, last = on_device[4:]
        self.last = last
        """Index of the last new token of each sequence, [B] (of sequences with new tokens)."""

    @property
    def positions(self) -> Tensor:
        return self._positions

    def previous(self, x: Tensor, layer_idx: int, stream: int) -> Tensor:
        tail = self._cache.tails[layer_idx][stream]
        if all(count == 1 for count in self._new):
            before = tail.clone()
            tail.copy_(x)
            return before
        seen = torch.cat([tail, x])
        tail.copy_(seen[self._tail])
        return seen[self._predecessor]

    def stored(self) -> StoredState:
        return StoredState(
            keys=self._cache.keys,
            values=self._cache.values,
            tails=self._cache.tails,
            past=self._past,
            new=self._new,
            table=None,
            pages=self._rows,
            slots=self._positions,
            before=self._before,
            kept=self._kept,
            kept_in=self._kept_in,
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer_idx: int, dropout: float) -> Tensor:
        keys, values = self._cache.keys[layer_idx], self._cache.values[layer_idx]
        keys.write(self._rows, self._positions, k)
        values.write(self._rows, self._positions, v)
        return attend(q, keys, values, self._past, self._new, dropout)
