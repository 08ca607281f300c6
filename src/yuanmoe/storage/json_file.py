"""JSON objects in files, read and written with errors that name the file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yuanmoe.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`. Raises CheckpointError where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); it is damaged or incomplete") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, not a JSON object")
    return values


def json_text(values: Mapping[str, Any]) -> str:
    """`values` as people read JSON files."""
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
