"""Annotations of public names can be evaluated, as checkers at run time do."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import transformer_lens_taskvec

MODULES = [
    "transformer_lens_taskvec",
    *(
        found.name
        for found in pkgutil.walk_packages(
            transformer_lens_taskvec.__path__, "transformer_lens_taskvec."
        )
        if not found.name.endswith("__main__")
    ),
]


def names_for_type_checking(module: ModuleType) -> dict[str, Any]:
    """What the module imports only when types are checked."""
    names: dict[str, Any] = {}
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    for block in ast.walk(tree):
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING"):
            exec(compile(ast.Module(block.body, []), str(module.__file__), "exec"), names)
    return names


def annotated(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The public functions and classes that the module defines, and the methods of the latter."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value):
            yield name, value
            for attribute, member in vars(value).items():
                for part in ("__func__", "fget", "func", "__wrapped__"):
                    member = getattr(member, part, None) or member
                if inspect.isfunction(member) and member.__module__ == module.__name__:
                    yield f"{name}.{attribute}", member


def problem(value: Any, names: dict[str, Any]) -> str:
    try:
        typing.get_type_hints(value, localns=names, include_extras=True)
    except Exception as error:
        return repr(error)
    return ""


@pytest.mark.parametrize("name", MODULES)
def test_annotations_can_be_evaluated(name: str) -> None:
    module = importlib.import_module(name)
    names = names_for_type_checking(module)
    found = {place: problem(value, names) for place, value in annotated(module)}
    assert not any(found.values()), {place: what for place, what in found.items() if what}


def test_the_test_sees_broken_annotations_methods_and_names_for_type_checking() -> None:
    places = {place for name in MODULES for place, _ in annotated(importlib.import_module(name))}
    assert {"find_tasks", "Task.sample", "MappingTask.__len__"} <= places
    assert len(places) > 200
    module = ModuleType(__name__)
    exec(
        "from __future__ import annotations\n"
        "from jaxtyping import Float\n"
        "from torch import Tensor\n"
        "def good(x: Float[Tensor, 'a b']) -> Float[Tensor, 'a *rest']: ...\n"
        "def lost(x: Float[Tensor, a * rest]) -> None: ...\n",
        vars(module),
    )
    assert set(typing.get_type_hints(module.good)) == {"x", "return"}
    with pytest.raises(NameError):
        typing.get_type_hints(module.lost)
