"""An adapter in PEFT's format, for `peft.PeftModel.from_pretrained` over the transformers shell `yuanmoe.hf`.

Matrices of linear layers become `target_modules`. Routers and experts are parameters without a layer of their own:
PEFT 0.17 and later adapt those as `target_parameters`, for which it keeps the factors of all experts in one matrix, A
as [E R, I] and B as [O, R E], and nests the wrappers of a module's parameters, the first innermost. Both were read off
what PEFT itself saves. Its names are those of the shell, whose queries and keys are the true ones: this is no adapter
for code that runs the official files' interleaved ones.
Legend: E experts, R rank, O outputs, I inputs.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from yuanmoe.checkpoint.adapters.adapter import Adapter, adapted_shapes
from yuanmoe.checkpoint.files.lazy import TensorView
from yuanmoe.checkpoint.files.safetensors_file import write_safetensors
from yuanmoe.errors import CheckpointError
from yuanmoe.model.lora.attach import A, B
from yuanmoe.model.lora.targets import ROUTER, lora_role_of
from yuanmoe.storage.folder import Kind, new_folder
from yuanmoe.storage.json_file import json_text
from yuanmoe.storage.whole_file import write_synced

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PARAMETERS = (ROUTER, "experts")
"""Roles that are parameters to PEFT, not modules."""
_KIND = Kind(noun="PEFT adapter", proof=CONFIG, error=CheckpointError)


def export_peft(adapter: Adapter, dst: Path | str, *, base: str | None = None, overwrite: bool = False) -> Path:
    """Writes the directory, whole or not at all. Raises what `folder.new_folder` raises.

    `base` is where PEFT finds the base model, a directory or a name on a hub; without it PEFT has to be given the
    model, as the last name of a directory would send it to a hub for a stranger of that name.
    """
    dst = Path(dst).absolute()
    names = list(adapted_shapes(adapter))
    tensors: dict[str, Tensor] = {}
    for name in names:
        a, b = _flattened(adapter.tensors[f"{name}.{A}"], adapter.tensors[f"{name}.{B}"])
        tensors |= {f"{_path(name, names)}.lora_A.weight": a, f"{_path(name, names)}.lora_B.weight": b}
    with new_folder(dst, overwrite=overwrite, kind=_KIND) as folder:
        write_safetensors(folder / TENSORS, {name: TensorView.of(tensor) for name, tensor in tensors.items()})
        write_synced(folder / CONFIG, json_text(_config(adapter, names, base)))
    return dst


def _config(adapter: Adapter, names: list[str], base: str | None) -> dict[str, object]:
    settings = adapter.settings
    parameters = [name for name in names if lora_role_of(name) in _PARAMETERS]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "use_rslora": settings.rslora,
        # PEFT cannot drop inputs of parameters, and refuses to load an adapter that says so.
        "lora_dropout": 0.0 if parameters else settings.dropout,
        "bias": "none",
        "inference_mode": True,
        "target_modules": _suffixes(name.removesuffix(".weight") for name in names if name not in parameters),
        "target_parameters": _suffixes(parameters) or None,
    }


def _suffixes(names: Iterable[str]) -> list[str]:
    """The names without their layer, each once."""
    return list(dict.fromkeys(re.sub(r"^model\.layers\.\d+\.", "", name) for name in names))


def _path(name: str, names: list[str]) -> str:
    """Where PEFT keeps the factors of a matrix."""
    module, _, parameter = name.rpartition(".")
    nested = parameter == "gate_up_proj" and f"{module}.down_proj" in names
    return f"base_model.model.{module}" + (".base_layer" if nested else "")


def _flattened(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both as matrices."""
    if a.ndim == 2:
        return a, b
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1).contiguous()
