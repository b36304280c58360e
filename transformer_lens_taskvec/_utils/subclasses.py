"""Finding a class by its name among those that are defined."""

from __future__ import annotations

from typing import Any


def subclass_named(base: type[Any], name: str) -> Any:
    """The subclass of this name, at any depth, None if there is none; the last one defined."""
    found = None
    for child in base.__subclasses__():
        found = (child if child.__name__ == name else subclass_named(child, name)) or found
    return found
