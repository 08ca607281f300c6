"""The settings of a recipe by name: `optimizer.learning_rate=3e-4` read and checked, and two recipes compared.

A name is a section and a field of it. Values are read by the field's type; what they must be beyond it, the recipe says
itself (`recipe.py`).
"""

import dataclasses
import json
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from yuanmoe.errors import UsageError
from yuanmoe.hints import closest
from yuanmoe.train.recipe.recipe import Recipe

_WORDS = {"true": True, "false": False}


def override(recipe: Recipe, assignments: Iterable[str]) -> Recipe:
    """`recipe` with settings changed: `section.field=value`, all at once, so that two may only fit together.

    Raises UsageError for an unknown name or a value of another type, ConfigError for values that describe no run.
    """
    changes: dict[str, dict[str, Any]] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise UsageError(f"{assignment!r} sets nothing; write it as section.field=value")
        section, field = _known(recipe, name.strip())
        changes.setdefault(section, {})[field] = _read(name.strip(), text, _type(getattr(recipe, section), field))
    sections = {name: dataclasses.replace(getattr(recipe, name), **fields) for name, fields in changes.items()}
    return dataclasses.replace(recipe, **sections)


def flat(recipe: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """All settings of a recipe's `to_dict` by name."""
    return {f"{section}.{field}": value for section, fields in recipe.items() for field, value in fields.items()}


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The names whose values differ, with both; what one side lacks is None there."""
    names = dict.fromkeys([*before, *after])
    return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}


def _known(recipe: Recipe, name: str) -> tuple[str, str]:
    names = list(flat(recipe.to_dict()))
    if name in names:
        section, _, field = name.partition(".")
        return section, field
    fields = {known.partition(".")[2]: known for known in names}
    field = closest(name.rpartition(".")[2], fields, cutoff=0.4)
    close = closest(name, names) or (field and fields[field])
    hint = f"did you mean {close}?" if close else f"sections: {', '.join(recipe.to_dict())}"
    raise UsageError(f"unknown setting {name!r}; {hint}")


def _type(settings: Any, field: str) -> Any:
    return get_type_hints(type(settings))[field]


def _read(name: str, text: str, wanted: Any) -> Any:
    """`text` as a value of the type `wanted`."""
    try:
        return _parse(text.strip(), wanted)
    except ValueError:
        raise UsageError(f"{name} is {text!r}; it must be {_say(wanted)}") from None


def _parse(text: str, wanted: Any) -> Any:
    """Raises ValueError for a text that is no value of that type."""
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin in (Union, types.UnionType):
        return _parse_any(text, arguments)
    if origin is Literal:
        return _one_of(text, dict(zip(arguments, arguments, strict=True)))
    if origin is tuple:
        parts = json.loads(text) if text.startswith("[") else text.split(",")
        return tuple(_parse(str(part), arguments[0]) for part in parts)
    if wanted is bool:
        return _one_of(text.lower(), _WORDS)
    if wanted is int:
        number = float(text)
        if not number.is_integer():
            raise ValueError(text)
        return int(text) if text.lstrip("+-").isdigit() else int(number)
    return wanted(text)


def _parse_any(text: str, kinds: tuple[Any, ...]) -> Any:
    if type(None) in kinds and text.lower() == "none":
        return None
    for kind in kinds:
        if kind is not type(None):
            try:
                return _parse(text, kind)
            except ValueError:
                continue
    raise ValueError(text)


def _one_of(text: str, choices: Mapping[str, Any]) -> Any:
    if text not in choices:
        raise ValueError(text)
    return choices[text]


def _say(wanted: Any) -> str:
    origin, arguments = get_origin(wanted), get_args(wanted)
    if wanted is type(None):
        return "none"
    if origin in (Union, types.UnionType):
        return " or ".join(map(_say, arguments))
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    if origin is tuple:
        return "a list in JSON" if arguments[0] is str else "numbers with commas"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[wanted]
