"""JSON schemas whose objects hold what they list and nothing else, unless they say otherwise.

JSON Schema lets an object that does not say `additionalProperties` hold anything, and a model that is held to such a
schema may invent keys until it is cut. Whoever lists properties means these (llama.cpp reads it this way too).
Left open: an object that says `additionalProperties` or `unevaluatedProperties`, one that lists no properties, one that
requires keys that it does not list, and what `allOf`, `anyOf`, `oneOf`, `if` or `$ref` put together with properties.
"""

from typing import Any

from yuanmoe.errors import UsageError

MAX_DEPTH = 100
COMBINING = ("allOf", "anyOf", "oneOf", "$ref", "if", "dependentSchemas")
SAYS = ("additionalProperties", "unevaluatedProperties")
NAMED = ("properties", "patternProperties", "$defs", "definitions")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
SINGLE = ("items", "additionalProperties", "additionalItems", "contains")


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with its objects closed, everywhere inside. Raises UsageError for one that is nested too deeply."""
    return _closed(schema, _combined(schema), 0, combined=False)


def _closed(schema: Any, combined_refs: frozenset[str], depth: int, *, combined: bool) -> Any:
    """`combined` schemas are one part of several for one object, so none can tell what the others list."""
    if not isinstance(schema, dict):
        return schema
    if depth > MAX_DEPTH:
        raise UsageError(f"the JSON schema is nested more than {MAX_DEPTH} deep; make it simpler")

    def inside(value: Any, combined: bool = False) -> Any:
        return _closed(value, combined_refs, depth + 1, combined=combined)

    result = dict(schema)
    combines = combined or _combines(schema)
    for key in NAMED:
        if isinstance(schema.get(key), dict):
            result[key] = {
                name: inside(value, f"#/{key}/{name}" in combined_refs) for name, value in schema[key].items()
            }
    for key in SINGLE:
        if isinstance(schema.get(key), dict):
            result[key] = inside(schema[key])
    for key in LISTS:
        if isinstance(schema.get(key), list):
            result[key] = [inside(value, combines and key in COMBINING) for value in schema[key]]
    if not combines and _lists_all(schema):
        result["additionalProperties"] = False
    return result


def _combines(schema: dict[str, Any]) -> bool:
    """Whether several schemas describe one object here."""
    parts = [key for key in COMBINING if key in schema]
    return bool(parts) and ("properties" in schema or len(parts) > 1 or _length(schema.get("allOf")) > 1)


def _lists_all(schema: dict[str, Any]) -> bool:
    listed = schema.get("properties")
    if not isinstance(listed, dict) or any(key in schema for key in SAYS):
        return False
    required = schema.get("required", [])
    fits = isinstance(required, list) and all(isinstance(name, str) and name in listed for name in required)
    least = schema.get("minProperties", 0)
    return fits and isinstance(least, int) and least <= len(listed)


def _combined(schema: Any) -> frozenset[str]:
    """The references that stand for a part of an object."""
    found, pending = set(), [(schema, False)]
    while pending:
        value, combined = pending.pop()
        if isinstance(value, list):
            pending += [(item, combined) for item in value]
        elif isinstance(value, dict):
            combines = combined or _combines(value)
            if combines and isinstance(value.get("$ref"), str):
                found.add(value["$ref"])
            pending += [(item, combines and key in COMBINING) for key, item in value.items()]
    return frozenset(found)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list) else 0
