"""What quantizing costs and saves, as JSON values: bytes by role, signal-to-noise by role and layer, the worst weights.

It is written beside the weights as `quantization.json`. Everything in it follows from the source and the settings, so
that an interrupted run ends with the same file as another. `facts` are what was remembered of each quantized weight
while it was written: {"noise": [[energy, energy of the errors], one for each matrix of a stack], "kept": its codes are
those of the GPTQ files, "tokens": of the calibration text, one for each expert}.
Not here: what a quantized model says, `evals/quality.py`.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

from yuanmoe.checkpoint.formats.packed_weight import WHOLE, role_of
from yuanmoe.checkpoint.open import OpenCheckpoint
from yuanmoe.checkpoint.quantize.encoding import Noise
from yuanmoe.ops.quantize.packed_format import PackedFormat
from yuanmoe.plan.cost import ROLES, Role
from yuanmoe.storage.json_file import read_json

REPORT = "quantization.json"

SCARCE = 8
"""A weight that met fewer tokens than inputs / 8 gains nothing measurable from them."""

WORST = 10
"""Matrices that are named as those that lost most."""

Facts = Mapping[str, Mapping[str, Any]]


def sizes(source: OpenCheckpoint, formats: Mapping[str, PackedFormat]) -> dict[Role, dict[str, int]]:
    """Parameters and bytes of each role before and after, and its bits (16: as they are)."""
    found: dict[Role, dict[str, int]] = {}
    for name, tensor in source.tensors.items():
        form = formats.get(name)
        mine = found.setdefault(role_of(name), {"bits": WHOLE, "parameters": 0, "source_bytes": 0, "bytes": 0})
        mine["parameters"] += tensor.numel
        mine["source_bytes"] += tensor.nbytes
        mine["bytes"] += tensor.nbytes if form is None else form.nbytes
        if form is not None:
            mine["bits"] = form.bits
    return {role: found[role] for role in ROLES if role in found}


def report_of(source: OpenCheckpoint, formats: Mapping[str, PackedFormat], method: str, facts: Facts) -> dict[str, Any]:
    """The content of `quantization.json`, where facts of every quantized weight are there."""
    noise = {name: [Noise(*pair) for pair in fact["noise"]] for name, fact in facts.items()}
    by_role, by_size = _by(noise, role_of), sizes(source, formats)
    return {
        "method": method,
        "group_size": next((form.group_size for form in formats.values()), None),
        "roles": {role: size | _loss(by_role.get(role)) for role, size in by_size.items()},
        "total": total_sizes(by_size),
        "layers": list(_layers(noise)),
        "worst": _worst(noise, formats),
        "notes": list(_notes(source, formats, facts)),
    }


def total_sizes(by_role: Mapping[Role, Mapping[str, int]]) -> dict[str, int]:
    """The sums of `sizes` over the roles."""
    return {key: sum(role[key] for role in by_role.values()) for key in ("parameters", "source_bytes", "bytes")}


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report in a folder; None where there is none. Raises CheckpointError for a damaged one."""
    return read_json(folder / REPORT) if (folder / REPORT).is_file() else None


def decibels(noise: Noise) -> float | None:
    """Signal-to-noise ratio; None where nothing was lost, or nothing was there."""
    return round(10 * math.log10(noise.signal / noise.noise), 2) if noise.signal and noise.noise else None


def _by(noise: Mapping[str, list[Noise]], key: Callable[[str], Any]) -> dict[Any, Noise]:
    found: dict[Any, Noise] = defaultdict(lambda: Noise(0.0, 0.0))
    for name, matrices in noise.items():
        found[key(name)] += sum(matrices, Noise(0.0, 0.0))
    return found


def _loss(noise: Noise | None) -> dict[str, float | None]:
    return {} if noise is None else {"snr_db": decibels(noise)}


def _layers(noise: Mapping[str, list[Noise]]) -> Iterator[dict[str, Any]]:
    """Signal-to-noise of the roles inside each layer."""
    inside = {name: matrices for name, matrices in noise.items() if ".layers." in name}
    found = _by(inside, lambda name: (int(name.split(".")[2]), role_of(name)))
    for layer in sorted({layer for layer, _ in found}):
        yield {"layer": layer} | {role: decibels(found[layer, role]) for role in ROLES if (layer, role) in found}


def _worst(noise: Mapping[str, list[Noise]], formats: Mapping[str, PackedFormat]) -> list[dict[str, Any]]:
    """The matrices with the least signal-to-noise."""
    rated = (
        {"name": name, "part": _part(formats[name].lead, index), "snr_db": ratio}
        for name, matrices in noise.items()
        for index, ratio in enumerate(map(decibels, matrices))
        if ratio is not None
    )
    return sorted(rated, key=itemgetter("snr_db"))[:WORST]


def _part(lead: tuple[int, ...], index: int) -> str:
    """Which matrix of a stack, in words."""
    if len(lead) == 2:
        return f"expert {index // 2}, {('gate', 'up')[index % 2]}"
    return f"expert {index}" if lead else ""


def _notes(source: OpenCheckpoint, formats: Mapping[str, PackedFormat], facts: Facts) -> Iterator[str]:
    """What a user should know of this source: padding, codes kept or not, weights that the text said little about."""
    exact = sum(form.matrices * form.rows * form.columns * form.bits // 8 for form in formats.values())
    padded = sum(math.prod(form.codes_shape) for form in formats.values())
    if padded > 1.01 * exact:
        yield (
            f"codes take {padded / exact - 1:.0%} more than their bits: rows are padded to 16 and inputs to whole "
            "groups; smaller groups may pad less"
        )
    if source.format == "gptq":
        kept = sum("kept" in fact for fact in facts.values())
        yield (
            f"{kept} of {len(formats)} quantized weights keep the codes of the GPTQ files bit for bit; the others "
            "have none there, or of other bits, groups or zeros. What stays whole is as precise as in those files"
        )
    yield from _calibration_notes(formats, facts)


def _calibration_notes(formats: Mapping[str, PackedFormat], facts: Facts) -> Iterator[str]:
    tokens = {name: fact["tokens"] for name, fact in facts.items() if "tokens" in fact}
    wide = [name for name in formats if tokens and ".layers." in name and name not in tokens]
    if wide:
        yield f"{len(wide)} weights have too many inputs for GPTQ and were rounded as by mse, {wide[0]} among them"
    scarce = [
        (count, name if len(counts) == 1 else f"{name} of expert {expert}")
        for name, counts in tokens.items()
        for expert, count in enumerate(counts)
        if count * SCARCE < formats[name].columns
    ]
    if scarce:
        count, where = min(scarce)
        yield (
            f"{len(scarce)} matrices met few tokens of the calibration text and are hardly better than by mse "
            f"({where}: {count}); a longer text reaches more"
        )
