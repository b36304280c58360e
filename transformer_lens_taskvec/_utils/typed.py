"""Whether values read from a file are of the types that a dataclass asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, get_type_hints

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

_SCALARS: Mapping[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
}


def check_names(
    cls: type[Any], values: Mapping[str, Any], *, also: tuple[str, ...] = (), prefix: str = ""
) -> None:
    """Raise a ValueError that names the first key that is no setting of a dataclass.

    Args:
        cls: The dataclass.
        values: What was read.
        also: Other keys that may be there.
        prefix: What stands before a key in the message.
    """
    known = [*(field.name for field in dataclasses.fields(cls) if field.init), *also]
    for name in values:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"unknown key {_cut(repr(prefix + name))}; {hint}")


def check_types(
    cls: type[Any], values: Mapping[str, Any], *, prefix: str = "", scalars_only: bool = False
) -> None:
    """Raise a ValueError that names the first value that is not of the type of its field.

    Lists count as tuples too, because JSON has no tuples. Annotations that cannot be resolved are
    not checked.

    Args:
        cls: The dataclass.
        values: What was read, by field.
        prefix: What stands before a key in the message.
        scalars_only: Whether to check only numbers, texts and truth values.
    """
    try:
        hints = get_type_hints(cls)
    except NameError:
        return
    for name, value in values.items():
        if name in hints and not (scalars_only and hints[name] not in _SCALARS):
            check_value(hints[name], value, prefix + name)


def check_value(hint: Any, value: Any, name: str) -> None:
    """Raise a ValueError that names a value unless it is of a type."""
    problem = ""
    for form in (value, _tuples(value)):
        if isinstance(value, bool) and hint in (int, float):
            break
        try:
            check_type(form, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
            return
        except TypeCheckError as error:
            problem = f" ({_cut(' '.join(str(error).split()))})"
    if hint in _SCALARS:
        raise ValueError(f"{name} is {_cut(repr(value))}; it must be {_SCALARS[hint]}")
    raise ValueError(f"{name} is {_cut(repr(value))}; it must be {hint}{problem}")


def _tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_tuples, value))
    if isinstance(value, dict):
        return {key: _tuples(one) for key, one in value.items()}
    return value


def _cut(text: str, width: int = 80) -> str:
    return text if len(text) <= width else f"{text[:width]}..."
