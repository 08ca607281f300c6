"""Official tensor names and shapes to our modules at load, and back at save, as transformers' weight conversions.

Nothing of the layout is written down here: which tensors belong together, and under which names, is read off
`checkpoint/formats/mapping.py` for one layer of each kind, and each conversion asks it again for the numbers of the
model at hand. So transformers reads the files (shards, safetensors or `.bin`, any device map, any dtype), and the
table stays in one place.
The conversions are registered for our class names, not for the model type "yuan": PEFT takes a conversion of a model
type to mean that old adapters fit other modules now, and would rewrite LoRA targets.
Not here: files, which transformers reads and writes.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from yuanmoe.checkpoint.files.lazy import TensorView
from yuanmoe.checkpoint.formats.mapping import TensorLayout, layout, to_native, to_official
from yuanmoe.config import ModelConfig
from yuanmoe.errors import CheckpointError
from yuanmoe.presets import preset

_FIRST_LAYER = "model.layers.0."


def _kinds() -> Iterator[ModelConfig]:
    """One layer of each kind that there is."""
    for changes in (
        {"num_experts": 0, "intermediate_size": 4},
        {},
        {"router_bias": True},
        {"router": "linear"},
        {"router": "shared-expert", "num_shared_experts": 1},
    ):
        yield preset("tiny", num_hidden_layers=1, **changes)


def _groups(table: TensorLayout) -> Iterator[TensorLayout]:
    """The parts of layer 0 that share no tensor with one another: queries with keys, every expert's `w1`, ..."""
    for native in table.native:
        officials = {span.official for span in table.spans if span.native == native}
        together = dict.fromkeys(span.native for span in table.spans if span.official in officials)
        if native.startswith(_FIRST_LAYER) and native == next(iter(together)):
            yield _restricted(table, together)


def _restricted(table: TensorLayout, names: Iterable[str]) -> TensorLayout:
    """The part of `table` with these native tensors and all that they consist of."""
    spans = [span for span in table.spans if span.native in names]
    officials = {span.official for span in spans}
    return TensorLayout(
        native={name: shape for name, shape in table.native.items() if name in names},
        official={name: shape for name, shape in table.official.items() if name in officials},
        spans=spans,
    )


def _patterns(names: Iterable[str]) -> list[str]:
    """Names without layer, with `*` for the expert, each once."""
    return list(dict.fromkeys(re.sub(r"experts\.\d+\.", "experts.*.", n.removeprefix(_FIRST_LAYER)) for n in names))


class _Convert(ConversionOps):
    """One group of one layer, in either direction, by the table of the model that is being loaded or saved."""

    supports_many_to_many = True

    def __init__(self, *, loading: bool) -> None:
        self.loading = loading

    @property
    def reverse_op(self) -> "_Convert":
        return _Convert(loading=not self.loading)

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        full_layer_name: str,
        model: Any,
        **_: Any,
    ) -> dict[str, Any]:
        """The tensors of `target_patterns` under their full names, out of those collected for `source_patterns`."""
        place = re.match(r"(.*?layers\.(\d+)\.)", full_layer_name)
        assert place is not None, f"{full_layer_name} is in no layer"
        natives = target_patterns if self.loading else source_patterns
        table = _restricted(_layer(model.native_config, int(place[2])), [_FIRST_LAYER + name for name in natives])
        tensors = [t for pattern in source_patterns for t in _listed(input_dict.get(pattern, []))]
        expected = table.official if self.loading else table.native
        if [tuple(t.shape) for t in tensors] != list(expected.values()):
            shapes = sorted({tuple(t.shape) for t in tensors})
            raise CheckpointError(
                f"layer {place[2]}: {', '.join(natives)} is made of {len(expected)} tensors of shapes "
                f"{sorted(set(expected.values()))}; the files hold {len(tensors)} of {shapes}"
            )
        views = {name: TensorView.of(tensor) for name, tensor in zip(expected, tensors, strict=True)}
        composed = to_native(table, views) if self.loading else to_official(table, views)
        return {place[1] + name.removeprefix(_FIRST_LAYER): tensor.read() for name, tensor in composed.items()}


def _layer(config: ModelConfig, index: int) -> TensorLayout:
    """The table of this layer alone, under the names of layer 0."""
    return layout(config.replace(num_hidden_layers=1, num_experts=config.experts_per_layer[index]))


def _listed(tensors: Tensor | list[Tensor]) -> list[Tensor]:
    return tensors if isinstance(tensors, list) else [tensors]


class _Converter(WeightConverter):
    """A conversion of several tensors to several; the constructor of transformers 5.17 wants only its own of these."""

    __slots__ = ()

    def __init__(self, source_patterns: Any, target_patterns: Any, operations: Any, force_cpu: bool = True) -> None:
        super(WeightConverter, self).__init__(source_patterns, target_patterns)
        self.operations = operations
        # Spans are joined where the file is read; only the result goes to its device.
        self.force_cpu = force_cpu


def conversions() -> list[WeightConverter | WeightRenaming]:
    """What becomes of each official tensor that has another name or shape with us."""
    found: dict[tuple[str, ...], WeightConverter | WeightRenaming] = {}
    for config in _kinds():
        for group in _groups(layout(config)):
            native, official = _patterns(group.native), _patterns(group.official)
            if list(group.native.values()) != list(group.official.values()) or len(native) > 1:
                found[tuple(official)] = _Converter(official, native, [_Convert(loading=True)])
            elif native != official:
                found[tuple(official)] = WeightRenaming(official, native)
    return list(found.values())
