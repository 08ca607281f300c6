"""A model larger than memory, one layer at a time: all tokens of a text pass a layer before the next one is read.

In float32 whatever the weights are stored in, and by the modules of the model itself; only experts are read one by one.
Legend: N tokens of the text, D hidden, E experts.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from yuanmoe.checkpoint.files.lazy import LazyTensor
from yuanmoe.checkpoint.formats.mapping import EMBEDDING
from yuanmoe.checkpoint.open import OpenCheckpoint
from yuanmoe.model.decoder import DecoderLayer, rotary_of
from yuanmoe.model.experts import MixtureOfExperts
from yuanmoe.model.router import Routing
from yuanmoe.model.state.sequences import WholeSequences
from yuanmoe.ops.products.grouped import swiglu

TOKENS_AT_ONCE = 4096
"""Tokens that are inside an expert together: 256 MiB of hidden values at M32's width."""


class StreamedExperts(nn.Module):
    """The experts of a layer, read from the checkpoint one after the other."""

    def __init__(self, gate_up: LazyTensor, down: LazyTensor, source: OpenCheckpoint) -> None:
        super().__init__()
        self._gate_up, self._down, self._source = gate_up, down, source

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(self._down.shape[0]):
            tokens, place = (routing.experts == expert).nonzero(as_tuple=True)
            if len(tokens):
                down = self._down.rows(expert, expert + 1)[0].float()
                parts = zip(tokens.split(TOKENS_AT_ONCE), self.hidden(expert, x, tokens), strict=True)
                shares = routing.weights[tokens, place, None].split(TOKENS_AT_ONCE)
                for (some, hidden), share in zip(parts, shares, strict=True):
                    out.index_add_(0, some, (hidden @ down.T) * share)
                self._source.release()
        return out

    def hidden(self, expert: int, x: Tensor, tokens: Tensor) -> Iterator[Tensor]:
        """What the down projection of an expert sees of `tokens`, some of them at a time."""
        gate_up = self._gate_up.rows(expert, expert + 1)[0].float()
        for some in tokens.split(TOKENS_AT_ONCE):
            yield swiglu(x[some] @ gate_up.T)


def open_layer(source: OpenCheckpoint, index: int) -> DecoderLayer:
    """A layer of a checkpoint; everything but its routed experts is in memory."""
    prefix = f"model.layers.{index}."
    with torch.device("meta"):
        layer = DecoderLayer(source.config, index)
    names = {f"{prefix}mlp.experts.gate_up_proj", f"{prefix}mlp.experts.down_proj"}
    if isinstance(layer.mlp, MixtureOfExperts):
        gate_up, down = (source.tensors[name] for name in sorted(names, reverse=True))
        layer.mlp.experts = StreamedExperts(gate_up, down, source)
    mine = [name for name in source.tensors if name.startswith(prefix) and name not in names]
    state = {name.removeprefix(prefix): source.tensors[name].read().float() for name in mine}
    layer.load_state_dict(state, assign=True)
    return layer.eval()


def embed(source: OpenCheckpoint, ids: Sequence[int]) -> Tensor:
    """The embeddings of a text, [N, D]."""
    return source.tensors[EMBEDDING].read()[torch.tensor(ids)].float()


def attend_windows(layer: DecoderLayer, source: OpenCheckpoint, x: Tensor, lengths: Sequence[int]) -> Tensor:
    """The first half of a layer on windows of a text, each of which sees itself alone."""
    parts = []
    for part in x.split(list(lengths)):
        sequences = WholeSequences(1, len(part))
        parts.append(layer.attend(part, sequences, rotary_of(source.config, sequences.positions)))
    return torch.cat(parts)


def window_lengths(tokens: int, context: int) -> list[int]:
    """Windows of `context` tokens, and one for the rest."""
    return [min(context, tokens - start) for start in range(0, tokens, context)]
