"""How the tokens of a transformers batch see their past: padding is left out, a `Cache` of transformers is the memory.

The model runs on the real tokens alone, so each computes what it would compute unpadded, wherever the padding stands.
Without a cache that is `WholeSequences`; with one it is `CachedRows`, over the layers that `DynamicCache(config=...)`
makes for "hybrid": keys and values slot by slot as transformers expects them (zero at padding), and as convolution
states the tail of LFA, which is the last real token's. Beams, cropping, offloading and saving of caches are therefore
transformers' own.
Legend: B rows, S slots of this pass, T slots in all, N real tokens of this pass, W width of a stream, H heads,
C head channels.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Shaped
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import LinearAttentionCacheLayerMixin, StaticLayer

from yuanmoe.config import Packing
from yuanmoe.errors import UsageError
from yuanmoe.model.state.sequences import Sequences, WholeSequences
from yuanmoe.ops.attention import attend_runs, causal_attention


class Padding:
    """Which slots hold tokens, and the new ones of them as a flat list and back. Asking costs one synchronisation."""

    def __init__(self, mask: Tensor | None, batch: tuple[int, int], past: int, device: torch.device) -> None:
        self.batch = batch
        """Rows and new slots, (B, S)."""
        self.visible = _visible(mask, batch, past, device)
        """[B, T]: all slots that hold tokens; None where all do."""
        everywhere = torch.ones(batch, dtype=torch.bool, device=device)
        self.real: Bool[Tensor, "B S"] = everywhere if self.visible is None else self.visible[:, past:]
        """The new slots that hold tokens."""
        self.lengths: list[int] = [batch[1]] * batch[0] if self.visible is None else self.real.sum(1).tolist()
        """New tokens of each row."""
        before = everywhere.cumsum(1) + past if self.visible is None else self.visible.cumsum(1)
        self.positions = self.pack(before[:, -batch[1] :] - 1)
        """Each new token's place among the tokens of its row, [N]."""

    def pack(self, padded: Shaped[Tensor, "B S *rest"]) -> Shaped[Tensor, "N *rest"]:
        """The new tokens, row by row."""
        return padded.flatten(0, 1) if self.visible is None else padded[self.real.to(padded.device)]

    def unpack(self, flat: Shaped[Tensor, "N *rest"]) -> Shaped[Tensor, "B S *rest"]:
        """The inverse of `pack`, zero at padding."""
        if self.visible is None:
            return flat.unflatten(0, self.batch)
        padded = flat.new_zeros(*self.batch, *flat.shape[1:])
        padded[self.real.to(flat.device)] = flat
        return padded


def _visible(mask: Tensor | None, batch: tuple[int, int], past: int, device: torch.device) -> Tensor | None:
    if mask is None:
        return None
    wanted = (batch[0], past + batch[1])
    if mask.shape != wanted:
        raise UsageError(
            f"attention_mask has shape {tuple(mask.shape)}; {batch[0]} rows of {past} cached and {batch[1]} new tokens "
            f"need {wanted}, 0 at padding"
        )
    visible = mask.to(device) != 0
    return None if bool(visible.all()) else visible


def whole_sequences(padding: Padding, documents: Tensor | None, packing: Packing) -> Sequences:
    """Rows from their beginnings, with no memory; `documents` [B, S] change where `packing` restarts something."""
    B, S = padding.batch
    device = padding.real.device
    if padding.visible is None:
        return WholeSequences(B, S, device=device, documents=documents, packing=packing)
    if packing not in ("continuous", "isolated"):
        raise UsageError(
            f"packing {packing!r} is not defined for padded rows; leave the padding out, or use 'isolated'"
        )
    if not any(padding.lengths):
        raise UsageError(f"attention_mask hides all {B} x {S} tokens; there is nothing to compute")
    # Rows of different lengths are isolated documents of one row.
    rows = (torch.arange(B, device=device) * S)[:, None].expand(B, S)
    flat = padding.pack(rows if documents is None else rows + documents)[None]
    return WholeSequences(1, flat.shape[1], device=device, documents=flat, packing="isolated")


class CachedRows:
    """The new tokens of each row, seeing all tokens that the cache holds of it."""

    def __init__(self, cache: Cache, padding: Padding) -> None:
        self._cache, self._padding = cache, padding
        self._past = cache.get_seq_length()
        # Indices into [tails of B rows; N new tokens]: at each slot, the last token of the row up to and with it.
        counts = padding.real.cumsum(1)
        earlier_rows = counts[:, -1].cumsum(0) - counts[:, -1]
        rows = torch.arange(len(counts), device=counts.device)[:, None]
        self._latest = torch.where(counts > 0, len(counts) + earlier_rows[:, None] + counts - 1, rows)
        self._predecessor = padding.pack(torch.cat([rows, self._latest[:, :-1]], dim=1))

    @property
    def positions(self) -> Tensor:
        return self._padding.positions

    def previous(self, x: Tensor, layer_idx: int, stream: int) -> Tensor:
        layer = self._cache.layers[layer_idx]
        assert isinstance(layer, LinearAttentionCacheLayerMixin)
        state = layer.conv_states[stream] if self._past else None
        tail = x.new_zeros(len(self._latest), x.shape[1]) if state is None else state[..., -1].to(x.device)
        seen = torch.cat([tail, x])
        # Only a cache that will be cropped (assisted generation) needs the tail as of every slot.
        latest = self._latest if layer.record_past else self._latest[:, -1:]
        tails = seen[latest.to(x.device)].transpose(1, 2)
        self._cache.update_conv_state(tails, layer_idx, state_idx=stream, conv_kernel_size=1)
        return seen[self._predecessor.to(x.device)]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer_idx: int, dropout: float) -> Tensor:
        padding, lengths = self._padding, self._padding.lengths
        padded_k, padded_v = (padding.unpack(t).transpose(1, 2) for t in (k, v))
        keys, values = (t.transpose(1, 2) for t in self._cache.update(padded_k, padded_v, layer_idx))
        if not len(q):  # A chunk of padding alone; the cache still counts its slots.
            return q
        if not self._past:
            return attend_runs(q, k, v, lengths, dropout)
        if padding.visible is None:
            return causal_attention(padding.unpack(q), keys, values, dropout).flatten(0, 1)
        visible = padding.visible.to(q.device)
        if set(lengths) == {1}:
            return _attend_to(q, keys, values, visible, dropout)
        rows = zip(q.split(lengths), keys, values, visible, strict=True)
        parts = [
            causal_attention(new[None], k[seen][None], v[seen][None], dropout)[0]
            for new, k, v, seen in rows
            if len(new)
        ]
        return torch.cat(parts)


def _attend_to(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, dropout: float) -> Tensor:
    """One token a row, `q` [B, H, C], to the `visible` [B, T] of `keys` and `values` [B, T, H, C], all in one call."""
    k, v = keys.transpose(1, 2), values.transpose(1, 2)
    out = F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=visible[:, None, None], dropout_p=dropout)
    return out[:, :, 0]


def check_cache(cache: Cache, num_layers: int, localized_filtering: bool) -> None:
    """Raises UsageError for a cache that cannot hold what this model remembers."""
    if localized_filtering and cache.offloading:
        # transformers brings filter states back while they are read already: it waits for them only at the keys.
        raise UsageError("an offloaded cache does not keep the filters' state in time; use the default cache")
    fits = len(cache.layers) == num_layers and not any(isinstance(layer, StaticLayer) for layer in cache.layers)
    if localized_filtering:
        fits = fits and all(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)
    if not fits:
        kinds = ", ".join(sorted({type(layer).__name__ for layer in cache.layers})) or "no layers"
        raise UsageError(
            f"past_key_values is a {type(cache).__name__} ({kinds}), which does not fit {num_layers} layers that grow "
            "and remember their filters; pass DynamicCache(config=model.config), or nothing"
        )
