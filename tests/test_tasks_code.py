"""Code tasks, against Python itself and other ways of getting the answers."""

from __future__ import annotations

import importlib
import operator
import re
from typing import Any

import pytest

from transformer_lens_taskvec.tasks.code import code_tasks

TASKS: dict[str, Any] = code_tasks()
ANSWERS = {name: {pair.x: pair.y for pair in task.pairs} for name, task in TASKS.items()}


@pytest.mark.parametrize("name", TASKS)
def test_inputs_are_distinct_and_copying_one_is_never_right(name: str) -> None:
    pairs = TASKS[name].pairs
    assert len({pair.x for pair in pairs}) == len(pairs) >= (42 if name == "operator_name" else 100)
    assert all(pair.x != pair.y for pair in pairs)
    assert all(text == text.strip() for pair in pairs for text in (pair.x, pair.y))


def test_camel_case_and_snake_case_are_each_others_reverse() -> None:
    for snake, camel in ANSWERS["snake_camel"].items():
        assert snake.isidentifier() and camel.isidentifier() and snake == snake.lower()
        assert re.sub("[A-Z]", lambda capital: "_" + capital[0].lower(), camel) == snake
    assert ANSWERS["camel_snake"] == {y: x for x, y in ANSWERS["snake_camel"].items()}


@pytest.mark.parametrize(
    ("base", "number", "write"), [("hex", 16, hex), ("octal", 8, oct), ("binary", 2, bin)]
)
def test_numerals_in_another_base_are_those_of_python(base: str, number: int, write: Any) -> None:
    for decimal, numeral in ANSWERS[f"decimal_{base}"].items():
        assert int(numeral, number) == int(decimal)
        assert write(int(decimal))[2:] == numeral
    for numeral, decimal in ANSWERS[f"{base}_decimal"].items():
        assert int(numeral, number) == int(decimal)
    assert ANSWERS[f"decimal_{base}"].keys() == ANSWERS["decimal_hex"].keys()


class Matrix(int):
    """A number with a matrix product, so that every operator has a meaning."""

    def __matmul__(self, other: int) -> int:
        return self * other + 1


@pytest.mark.parametrize(("expression", "name"), ANSWERS["operator_name"].items())
def test_the_operator_module_does_what_the_operator_does(expression: str, name: str) -> None:
    function = getattr(operator, name)
    inside = {"contains", "getitem", "setitem", "delitem"}
    first: Any = {3: "x"} if name in inside else Matrix(13)
    by_hand: Any = {3: "x"} if name in inside else Matrix(13)
    scope = {"a": first, "b": 3, "c": "y"}
    words = set(re.findall("[abc]", re.sub("del|is|in|not", "", expression)))
    arguments = [{"a": by_hand, "b": 3, "c": "y"}[word] for word in sorted(words)]
    wanted = function(*arguments)
    if " = " in expression or "del " in expression:
        exec(expression, scope)
        assert scope["a"] == by_hand
    elif name[0] == "i" and name not in ("invert", "is_", "is_not"):
        exec(expression, scope)
        assert scope["a"] == wanted
    else:
        assert eval(expression, scope) == wanted


def test_every_operator_of_the_module_is_asked_for() -> None:
    named = {name for name in operator.__all__ if hasattr(operator, f"__{name.strip('_')}__")}
    not_written = {"abs", "call", "concat", "iconcat", "index", "inv"}
    assert named - not_written <= {*ANSWERS["operator_name"].values()}


@pytest.mark.parametrize("name", ANSWERS["python_javascript"])
def test_the_python_side_exists(name: str) -> None:
    *parents, last = name.split(".")
    try:
        owner: Any = importlib.import_module(".".join(parents) or "builtins")
    except ModuleNotFoundError:
        owner = getattr(importlib.import_module("builtins"), parents[0])
    assert name in ("None", "True", "False") or hasattr(owner, last)


def test_the_javascript_side_is_a_dotted_name() -> None:
    answers = ANSWERS["python_javascript"]
    assert all(
        re.fullmatch(r"[A-Za-z0-9]+(\.[A-Za-z0-9]+)*", answer) for answer in answers.values()
    )
    # What Math has in common with math is spelled alike, constants in capitals.
    for python, javascript in answers.items():
        if python.startswith("math.") and javascript.startswith("Math."):
            assert javascript.lower() == python
    assert (answers["len"], answers["json.dumps"]) == ("length", "JSON.stringify")


def test_extensions_belong_to_the_lexer_of_their_language() -> None:
    lexers = pytest.importorskip("pygments.lexers")
    agree = {}
    for extension, language in ANSWERS["extension_language"].items():
        assert re.fullmatch(r"\.[a-z0-9]+", extension)
        lexer = lexers.find_lexer_class_for_filename(f"file{extension}")
        if lexer is not None:
            names = [lexer.name, *lexer.aliases]
            agree[extension] = language.lower() in [name.lower() for name in names]
    # Its lexers of dialects have names of their own.
    assert {extension for extension, same in agree.items() if not same} <= {
        ".jsx", ".tsx", ".lean", ".sql", ".vim",
    }  # fmt: skip
    assert len(agree) >= 100
