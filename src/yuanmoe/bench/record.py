"""Measurements as tracked files, and the README's table made of them.

A file holds what was measured, on which machine, when and by which command. One with a `row` is a line of the table:
texts in two languages, with the names of its `figures` in braces.
Not here: measuring.
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from yuanmoe.errors import UsageError
from yuanmoe.plan.device.machine import read_machine
from yuanmoe.storage.json_file import json_text, read_json

Language = Literal["en", "zh"]

BEGIN, END = "<!-- measurements: yuanmoe bench table -->", "<!-- end of measurements -->"
"""What stands around the table in a page."""
_HEADS = {"en": ("measured", "value", "where and how"), "zh": ("测量", "数值", "机器与命令")}


def record(folder: Path, name: str, command: str, result: dict[str, Any]) -> Path:
    """Writes a result as `folder`/NAME.json, with today's date and this machine; what says how it is shown stays."""
    machine = read_machine()
    file = folder / f"{name}.json"
    before = read_json(file) if file.is_file() else {}
    measured = {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cpu": machine.cpu, "cores": machine.cores, "memory_bytes": machine.memory_bytes},
        "source": command,
        "result": result,
    }
    kept = {key: before[key] for key in ("place", "row", "figures") if key in before}
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json_text(kept | measured), encoding="utf-8")
    return file


def measurement_table(folder: Path, language: Language) -> str:
    """The table in Markdown: a line for each file with a row, in the order of their `place`."""
    found = [(file, read_json(file)) for file in folder.glob("*.json")]
    rows = sorted(((each["place"], file, each) for file, each in found if "row" in each), key=lambda row: row[:2])
    head = _HEADS[language]
    lines = [head, tuple("---" for _ in head), *(_cells(file, each, language) for _, file, each in rows)]
    return "\n".join("|" + "|".join(cell if cell == "---" else f" {cell} " for cell in line) + "|" for line in lines)


def write_table(page: Path, folder: Path) -> bool:
    """Puts the table between its marks in a page; whether that changed it. Raises UsageError where the marks lack."""
    text = page.read_text(encoding="utf-8")
    start, end = text.find(BEGIN), text.find(END)
    if start < 0 or end < start:
        raise UsageError(f"{page} has no place for the table; put the lines {BEGIN} and {END} there")
    language: Language = "zh" if page.stem.endswith("_zh") else "en"
    new = f"{text[: start + len(BEGIN)]}\n\n{measurement_table(folder, language)}\n\n{text[end:]}"
    if new != text:
        page.write_text(new, encoding="utf-8")
    return new != text


def _cells(file: Path, each: dict[str, Any], language: Language) -> Sequence[str]:
    figures = {name: _figure(file, each, value) for name, value in each.get("figures", {}).items()}
    try:
        return tuple(text.format_map(figures) for text in each["row"][language])
    except (KeyError, ValueError, IndexError) as error:
        raise UsageError(f"{file}: the row names a figure that is not there: {error}") from error


def _figure(file: Path, each: dict[str, Any], value: Any) -> Any:
    """A number as it stands, or the number at a path in the result, such as `decode/0/tokens_per_s/median`."""
    if not isinstance(value, str):
        return value
    found = each.get("result")
    for step in value.split("/"):
        try:
            found = found[int(step)] if isinstance(found, list) else found[step]  # pyright: ignore[reportOptionalSubscript]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UsageError(f"{file}: its result has nothing at {json.dumps(value)}") from error
    return found
