"""What a checkpoint's makers say of its use: `model_card.json` beside the weights, read and bounded.

It holds `kind` (`chat`, or `completion` for a model that continues texts), `languages` (natural or programming), the
sampling that they advise, and by the reader's language (`en`, `zh`) `limits`, one sentence, and `suggestions`, first
prompts. Where the file advises no sampling, transformers' `generation_config.json` is asked. Neither is needed.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from yuanmoe.errors import CheckpointError

CARD_FILE = "model_card.json"
GENERATION_FILE = "generation_config.json"
MAX_BYTES = 64 * 1024
MAX_SUGGESTIONS = 6

Kind = Literal["chat", "completion"]
SAMPLING = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "top_k": (0, 1000),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.1, 2.0),
}
"""Fields that can be advised, each with its least and greatest value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageCard:
    """How a model is meant to be used."""

    kind: Kind = "chat"
    languages: tuple[str, ...] = ()
    sampling: Mapping[str, float] = field(default_factory=dict)
    limits: Mapping[str, str] = field(default_factory=dict)
    """By language, one sentence on what the model cannot do."""
    suggestions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By language, first prompts."""


def read_card(folder: Path) -> UsageCard:
    """The card of a checkpoint. Raises CheckpointError for a `model_card.json` that cannot be meant."""
    path = folder / CARD_FILE
    card = _read(path)
    kind = card.get("kind", "chat")
    if kind not in get_args(Kind):
        raise CheckpointError(f"{path}: kind is {str(kind)[:40]!r}; it is one of {', '.join(get_args(Kind))}")
    advised = _object(path, card, "sampling") or _advised_elsewhere(folder)
    return UsageCard(
        kind=kind,
        languages=_texts(path, "languages", card.get("languages", [])),
        sampling={name: _number(path, name, value) for name, value in advised.items()},
        limits={name: _text(path, "limits", text) for name, text in _object(path, card, "limits").items()},
        suggestions={
            name: _texts(path, "suggestions", texts) for name, texts in _object(path, card, "suggestions").items()
        },
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise CheckpointError(f"{path} has {size:,} bytes, a card has at most {MAX_BYTES:,}")
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}; correct it, or remove it") from error
    if not isinstance(read, dict):
        raise CheckpointError(f"{path} is not a JSON object; correct it, or remove it")
    return read


def _advised_elsewhere(folder: Path) -> dict[str, Any]:
    """What `generation_config.json` advises for sampling; a greedy default (`do_sample` off) advises nothing."""
    path = folder / GENERATION_FILE
    try:
        config = _read(path)
    except CheckpointError:
        return {}  # not our file: what transformers makes of it is not known here
    if not config.get("do_sample"):
        return {}
    return {name: config[name] for name in SAMPLING if _is_within(name, config.get(name))}


def _is_within(name: str, value: Any) -> bool:
    least, most = SAMPLING[name]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and least <= value <= most


def _number(path: Path, name: str, value: Any) -> float:
    if name not in SAMPLING:
        raise CheckpointError(f"{path}: sampling has {name[:40]!r}; it may have {', '.join(SAMPLING)}")
    if not _is_within(name, value):
        raise CheckpointError(f"{path}: {name} is {str(value)[:40]}, outside {SAMPLING[name][0]}..{SAMPLING[name][1]}")
    return value


def _object(path: Path, card: dict[str, Any], name: str) -> dict[str, Any]:
    value = card.get(name, {})
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {name} is not a JSON object")
    return value


def _texts(path: Path, name: str, values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or len(values) > MAX_SUGGESTIONS:
        raise CheckpointError(f"{path}: {name} is not a list of at most {MAX_SUGGESTIONS} texts")
    return tuple(_text(path, name, value) for value in values)


def _text(path: Path, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise CheckpointError(f"{path}: {name} holds {str(value)[:40]}, which is not a text")
    return value
