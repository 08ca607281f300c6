"""A row of a table as a JSON record: text, numbers, lists and objects; bytes are read as UTF-8 text.

Times, decimals, bytes that are not UTF-8 and other values without a JSON form become an object that names their type.
Where text is needed such a record is refused, and in every other field it does no harm. Not here: files (`records.py`).
"""

import json
from collections.abc import Mapping
from typing import Any


def row_json(row: Mapping[str, Any]) -> bytes:
    """The record of a row of Arrow scalars."""
    return json.dumps({name: _value(scalar) for name, scalar in row.items()}, ensure_ascii=False).encode()


def _value(scalar: Any) -> Any:
    # Not `as_py` of everything: it raises for times of nanoseconds and for strings that are not UTF-8.
    value: Any = None
    match type(scalar).__name__.removesuffix("Scalar").removeprefix("Large") if scalar.is_valid else "Null":
        case "Null":
            pass
        case "String" | "StringView" | "Binary" | "BinaryView" | "FixedSizeBinary":
            value = _text(scalar)
        case "Dictionary" | "Extension":
            value = _value(scalar.value)
        case "List" | "ListView" | "FixedSizeList":
            value = [_value(item) for item in scalar.values]
        case "Struct":
            value = {field.name: _value(scalar[place]) for place, field in enumerate(scalar.type)}
        case "Boolean" | "Int8" | "Int16" | "Int32" | "Int64" | "UInt8" | "UInt16" | "UInt32" | "UInt64":
            value = scalar.as_py()
        case "HalfFloat" | "Float" | "Double":
            value = float(scalar.as_py())
        case _:
            value = {str(scalar.type): "not text"}
    return value


def _text(scalar: Any) -> str | dict[str, str]:
    try:
        return scalar.as_buffer().to_pybytes().decode()
    except UnicodeDecodeError as error:
        return {str(scalar.type): f"not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}"}
