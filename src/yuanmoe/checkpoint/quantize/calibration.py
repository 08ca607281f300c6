"""What the weights of a checkpoint meet when the model reads a text: the moments that GPTQ needs, layer by layer.

The text passes the model as it is in the checkpoint, in full precision; so what a layer meets does not depend on how
earlier ones were rounded, and an interrupted run finds the same numbers again. One layer is in memory at a time, and of
it one expert. Not here: rounding (`ops/quantize/compensate.py`), passing a layer (`streamed.py`).
Legend: N tokens of the text, D hidden, I inputs of a weight, E experts.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from yuanmoe.checkpoint.files.lazy import LazyTensor
from yuanmoe.checkpoint.open import OpenCheckpoint
from yuanmoe.checkpoint.quantize.encoding import Noise, WeightEncoder, measure_noise
from yuanmoe.checkpoint.quantize.streamed import (
    TOKENS_AT_ONCE,
    StreamedExperts,
    attend_windows,
    embed,
    open_layer,
    window_lengths,
)
from yuanmoe.errors import UsageError
from yuanmoe.model.decoder import DecoderLayer
from yuanmoe.model.experts import DenseFeedForward, MixtureOfExperts
from yuanmoe.model.router import Routing
from yuanmoe.ops.products.grouped import swiglu
from yuanmoe.ops.quantize.compensate import Compensation, compensation, quantize_compensated
from yuanmoe.ops.quantize.groupwise import BLOCK_ROWS, QuantizedTensor
from yuanmoe.ops.quantize.packed_format import PackedFormat

WINDOW = 2048
"""Tokens of the text that are read together, where the model's context allows."""
LARGEST_INPUTS = 16_384
"""Beyond, the moments of a weight and their inverse take more than 2 GiB; such weights are rounded as by `mse`."""
ROUNDED_AT_ONCE = 1 << 26
"""Weights whose errors are made up for together."""

ATTENTION_INPUTS = ("lfa.conv1", "lfa.conv2", "q_proj", "v_proj", "o_proj")
"""Linear layers whose inputs are looked at; keys see what queries see."""


class Moments(NamedTuple):
    """The sum of x x^T over the inputs x of `tokens` tokens, [I, I]."""

    total: Tensor
    tokens: int


class _OpenLayer(NamedTuple):
    layer: DecoderLayer
    attended: Tensor
    """After the first half of the layer, [N, D]."""
    normed: Tensor
    """What routers and experts see, [N, D]."""
    routing: Routing | None
    moments: dict[str, Moments]
    """Of the linear layers in the first half."""


class Calibration:
    """A text on its way through a checkpoint. Ask for weights in the order of the model."""

    def __init__(self, source: OpenCheckpoint, ids: Sequence[int]) -> None:
        """Raises UsageError for ids that the model does not have."""
        wrong = next((token for token in ids if not 0 <= token < source.config.vocab_size), None)
        if wrong is not None:
            raise UsageError(
                f"the calibration text holds the token id {wrong}; ids are 0..{source.config.vocab_size - 1}"
            )
        self._source, self._ids = source, ids
        self._lengths = window_lengths(len(ids), min(WINDOW, source.config.max_position_embeddings))
        self._x: Tensor | None = None
        self._index = 0
        self._open: _OpenLayer | None = None
        self._found: tuple[str, int, Compensation] | None = None
        self.tokens: dict[str, dict[int, int]] = {}
        """How many of the text each weight met, by expert."""

    def covers(self, name: str) -> bool:
        """Whether the text says anything about a weight: it is inside a layer and not too wide."""
        return ".layers." in name and self._source.tensors[name].shape[-1] <= LARGEST_INPUTS

    @torch.inference_mode()
    def compensation(self, name: str, expert: int) -> Compensation:
        """For a weight, or one expert's part of it."""
        if self._found is None or self._found[:2] != (name, expert):
            self._found = None  # Two at a time would not fit.
            moments = self._moments(name, expert)
            self.tokens.setdefault(name, {})[expert] = moments.tokens
            self._found = (name, expert, compensation(*moments))
        return self._found[2]

    def _moments(self, name: str, expert: int) -> Moments:
        _, _, index, half, rest = name.split(".", 4)
        state = self._enter(int(index))
        if half == "self_attn":
            return state.moments[rest.removesuffix(".weight").replace("k_proj", "q_proj")]
        tokens = torch.arange(len(state.normed))
        if rest.startswith("experts."):
            assert state.routing is not None
            tokens = (state.routing.experts == expert).any(dim=1).nonzero()[:, 0]
        parts = (state.normed[some] for some in tokens.split(TOKENS_AT_ONCE))
        if "down_proj" in rest:
            parts = _hidden(state, rest, expert, tokens)
        return _summed(parts, self._source.tensors[name].shape[-1])

    def _enter(self, index: int) -> _OpenLayer:
        while self._index < index:
            state = self._open or self._opened(moments=False)
            self._x = state.layer.feed_forward(state.attended)[0]
            self._open = None
            self._index += 1
            self._source.release()
        assert self._index == index, "weights come in the order of the model"
        self._open = self._open or self._opened(moments=True)
        return self._open

    def _opened(self, *, moments: bool) -> _OpenLayer:
        """The current layer with its first half done."""
        layer = open_layer(self._source, self._index)
        x = embed(self._source, self._ids) if self._x is None else self._x
        self._x = None
        with _observed(layer.self_attn, ATTENTION_INPUTS if moments else ()) as found:
            attended = attend_windows(layer, self._source, x, self._lengths)
        normed = layer.post_attention_layernorm(attended)
        routing = layer.mlp.router(normed) if isinstance(layer.mlp, MixtureOfExperts) else None
        self._source.release()
        return _OpenLayer(layer, attended, normed, routing, found)


@contextmanager
def _observed(module: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Moments]]:
    """The moments of what some linear layers of `module` see meanwhile."""
    found: dict[str, Moments] = {}

    def observe(name: str, x: Tensor) -> None:
        before = found.get(name) or Moments(torch.zeros(x.shape[1], x.shape[1]), 0)
        found[name] = Moments(before.total.addmm_(x.T, x), before.tokens + len(x))

    present = {name: layer for name, layer in module.named_modules() if name in names}
    with ExitStack() as hooks:
        for name, layer in present.items():
            hooks.enter_context(layer.register_forward_pre_hook(lambda _, inputs, name=name: observe(name, inputs[0])))
        yield found


def _summed(parts: Iterable[Tensor], inputs: int) -> Moments:
    total, tokens = torch.zeros(inputs, inputs), 0
    for part in parts:
        total.addmm_(part.T, part)
        tokens += len(part)
    return Moments(total, tokens)


def _hidden(state: _OpenLayer, rest: str, expert: int, tokens: Tensor) -> Iterator[Tensor]:
    """What a down projection sees of some tokens."""
    mlp = state.layer.mlp
    if rest.startswith("experts."):
        assert isinstance(mlp, MixtureOfExperts)
        assert isinstance(mlp.experts, StreamedExperts)
        yield from mlp.experts.hidden(expert, state.normed, tokens)
        return
    dense = mlp.shared_experts if isinstance(mlp, MixtureOfExperts) else mlp
    assert isinstance(dense, DenseFeedForward)
    for some in tokens.split(TOKENS_AT_ONCE):
        yield swiglu(dense.gate_up_proj(state.normed[some]))


class Calibrated(WeightEncoder):
    """Rounding that makes up for its errors on a calibration text."""

    alone = True

    def __init__(self, tensor: LazyTensor, form: PackedFormat, calibration: Calibration, name: str) -> None:
        super().__init__(tensor, form)
        self._calibration, self._name = calibration, name

    @property
    def rows_at_once(self) -> int:
        return max(BLOCK_ROWS, ROUNDED_AT_ONCE // self.form.columns // BLOCK_ROWS * BLOCK_ROWS)

    def encode(self, matrix: int, first: int, last: int) -> tuple[QuantizedTensor, Noise]:
        experts = self.form.lead[0] if self.form.lead else 1
        spread = self._calibration.compensation(self._name, matrix * experts // self.form.matrices)
        weight = self.weight(matrix, first, last)
        found = quantize_compensated(weight, spread, self.form.bits, self.form.group_size)
        return found, measure_noise(weight, found)

    def facts(self) -> dict[str, Any]:
        tokens = self._calibration.tokens[self._name]
        return {"tokens": [tokens[expert] for expert in sorted(tokens)]}
