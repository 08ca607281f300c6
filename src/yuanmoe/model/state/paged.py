"""The state of many sequences in pages that they can share: keys, values, and the LFA tail, page by page.

A page holds the keys and values of P tokens, and the tail of the filter behind the last of them that is there. So the
state of a sequence is its pages and nothing else: a prefix that ends with a page can be continued by anyone, exactly,
and giving pages back frees all. Who owns which page is the caller's business (`engine/pages.py`).
Legend: N new tokens of the pass, B sequences, P slots of a page, M pages of a sequence, G sequences with one new token,
D hidden, H heads, C head channels.
"""

import numpy as np
import torch
from jaxtyping import Float, Int32, Shaped
from torch import Tensor

from yuanmoe.config import ModelConfig
from yuanmoe.model.state.key_values import Slots
from yuanmoe.model.state.sequences import StoredState
from yuanmoe.ops import native
from yuanmoe.ops.attention import attend_padded, causal_attention


class PagedCache:
    """Room for `num_pages` pages of `page_size` tokens, taken at once (touched only as it fills).

    Tails of a page in a layer, [D] and [D / 2], have `dtype`; keys and values `kv_dtype`, the same unless given.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_pages: int,
        page_size: int,
        *,
        dtype: torch.dtype,
        kv_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        slots = (num_pages, config.num_attention_heads, page_size, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [Slots(slots, kv_dtype or dtype, device) for _ in layers]
        self.values = [Slots(slots, kv_dtype or dtype, device) for _ in layers]
        widths = (config.hidden_size, config.hidden_size // 2) if config.localized_filtering else ()
        # The row behind the last page is the tail of a sequence that is empty: zero, and never written.
        self.tails = [[torch.zeros(num_pages + 1, D, dtype=dtype, device=device) for D in widths] for _ in layers]
        self.num_pages = num_pages
        self.page_size = page_size
        self.device = torch.device(device)


class PagedSequences:
    """The next `new[b]` tokens of each sequence, flat, behind the `past[b]` that its pages hold.

    `table[b, i]` is the page of its tokens i * P and on, up to the last new one; entries behind that are any page. The
    pages that the new tokens fall into belong to that sequence alone. `last` is the index of the last new token of each
    sequence, [B].
    """

    def __init__(self, cache: PagedCache, past: list[int], new: list[int], table: Int32[np.ndarray, "B M"]) -> None:
        assert min(new) > 0, "a sequence without new tokens"
        P = cache.page_size
        self._cache, self._past, self._new, self._table = cache, past, new, torch.from_numpy(table)
        before, everyone = np.array(past), np.arange(len(new))
        if sum(new) == len(new):
            rows, positions, self.last, predecessors = everyone, before, everyone, everyone
        else:
            rows, positions, self.last, predecessors = _spread(before, np.array(new))
        slots = positions % P
        pages = table[rows, positions // P]
        # A tail is kept behind every page that fills up, and behind the last new token.
        kept = slots == P - 1
        kept[self.last] = True
        (places,) = kept.nonzero()
        tails = np.where(before > 0, table[everyone, (before - 1) // P], cache.num_pages)
        # One transfer for all: on a GPU each costs as much as a small kernel.
        parts = (positions, pages, slots, places, pages[places], tails, predecessors)
        together = torch.from_numpy(np.concatenate(parts)).to(cache.device).split([len(part) for part in parts])
        self._positions, self._pages, self._slots, self._kept, self._kept_in, self._tails, self._predecessors = together

    @property
    def positions(self) -> Tensor:
        return self._positions

    def previous(self, x: Tensor, layer_idx: int, stream: int) -> Tensor:
        tails = self._cache.tails[layer_idx][stream]
        before = tails.index_select(0, self._tails)
        if len(before) == len(x):
            tails.index_copy_(0, self._kept_in, x)
            return before
        tails.index_copy_(0, self._kept_in, x.index_select(0, self._kept))
        return torch.cat([before, x]).index_select(0, self._predecessors)

    def stored(self) -> StoredState | None:
        if self._cache.page_size % native.PAGE_SLOTS and self._table.shape[1] > 1:
            return None
        return StoredState(
            keys=self._cache.keys,
            values=self._cache.values,
            tails=self._cache.tails,
            past=self._past,
            new=self._new,
            table=self._table,
            pages=self._pages,
            slots=self._slots,
            before=self._tails,
            kept=self._kept,
            kept_in=self._kept_in,
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer_idx: int, dropout: float) -> Tensor:
        assert not dropout, "dropout is for training, which has no cache"
        keys, values = self._cache.keys[layer_idx], self._cache.values[layer_idx]
        keys.write(self._pages, self._slots, k)
        values.write(self._pages, self._slots, v)
        whole_blocks = self._cache.page_size % native.PAGE_SLOTS == 0 or self._table.shape[1] == 1
        if whole_blocks and native.suits_attention(q, keys.values, values.values):
            scales = None if keys.scales is None or values.scales is None else (keys.scales, values.scales)
            return native.attention(q, keys.values, values.values, self._past, self._new, scales, self._table)
        return self._attend_copies(q, keys, values)

    def _attend_copies(self, q: Tensor, keys: Slots, values: Slots) -> Tensor:
        """Over keys and values copied out of their pages: on a GPU, and for what the kernel does not take.

        Sequences with one new token share a call, the others have one each.
        """
        lengths = [before + count for before, count in zip(self._past, self._new, strict=True)]
        single = [row for row, count in enumerate(self._new) if count == 1]
        out = torch.empty_like(q)
        if len(single) > 1:
            longest = max(lengths[row] for row in single)
            k, v = (_read(slots, self._table[single], longest, q.dtype) for slots in (keys, values))
            places = torch.from_numpy(self.last[single]).to(q.device)
            filled = torch.tensor([lengths[row] for row in single], device=q.device)
            out[places] = attend_padded(q[places], k, v, filled)
        for row, (count, length) in enumerate(zip(self._new, lengths, strict=True)):
            if count > 1 or len(single) == 1:
                mine = slice(self.last[row] + 1 - count, self.last[row] + 1)
                k, v = (_read(slots, self._table[row : row + 1], length, q.dtype) for slots in (keys, values))
                out[mine] = causal_attention(q[None, mine], k, v)[0]
        return out


def _spread(before: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of `counts` [B] new tokens behind `before` [B]: the sequence and position of each [N], and the last of each [B].

    And of each the predecessor [N], as an index into [tails of B sequences; N new tokens]: a first token's is its
    sequence's tail.
    """
    B = len(counts)
    ends = counts.cumsum()
    starts = ends - counts
    rows, order = np.arange(B).repeat(counts), np.arange(ends[-1])
    predecessors = order + B - 1
    predecessors[starts] = np.arange(B)
    return rows, order + (before - starts)[rows], ends - 1, predecessors


def _read(slots: Slots, table: Shaped[Tensor, "G M"], length: int, dtype: torch.dtype) -> Float[Tensor, "G T H C"]:
    """The first `length` slots of some sequences; where they are one page, not even copied."""
    P = slots.values.shape[2]
    if len(table) == 1 and length <= P:
        page = int(table[0, 0])
        return slots.read(slice(page, page + 1), length, dtype)
    pages = table[:, : -(-length // P)].long().to(slots.values.device)
    values = slots.values[:, :, :length][pages].to(dtype)
    if slots.scales is not None:
        values = values * slots.scales[:, :, :length][pages][..., None].to(dtype)
    return values.transpose(2, 3).flatten(1, 2)[:, :length]
