"""Code tasks: identifier case, number bases, operators, built-ins and file extensions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product

from transformer_lens_taskvec.tasks._data import read_pairs
from transformer_lens_taskvec.tasks.base import Task, by_name, mapping_task

# From 16 on, a numeral in any of the bases differs from the decimal one.
_NUMBERS = range(16, 116)

_VERBS = ("get", "set", "load", "save", "find", "parse", "update", "remove", "check", "count")
_NOUNS = (
    "user_name", "file_path", "max_size", "error_code", "line_number", "default_value", "row",
    "token", "image_width", "cache",
)  # fmt: skip

Pairs = Iterable[tuple[str, str]]


def _identifiers() -> Iterator[tuple[str, str]]:
    for verb, noun in product(_VERBS, _NOUNS):
        first, *others = f"{verb}_{noun}".split("_")
        yield "_".join([first, *others]), first + "".join(word.capitalize() for word in others)


def _numerals(spec: str) -> Iterator[tuple[str, str]]:
    return ((str(number), format(number, spec)) for number in _NUMBERS)


def _reversed(pairs: Pairs) -> Iterator[tuple[str, str]]:
    return ((y, x) for x, y in pairs)


_PAIRS: dict[str, Callable[[], Pairs]] = {
    "snake_camel": _identifiers,
    "camel_snake": lambda: _reversed(_identifiers()),
    "decimal_hex": lambda: _numerals("x"),
    "hex_decimal": lambda: _reversed(_numerals("x")),
    "decimal_octal": lambda: _numerals("o"),
    "octal_decimal": lambda: _reversed(_numerals("o")),
    "decimal_binary": lambda: _numerals("b"),
    "binary_decimal": lambda: _reversed(_numerals("b")),
    **{
        name: partial(read_pairs, name)
        for name in ("operator_name", "python_javascript", "extension_language")
    },
}
CODE = tuple(_PAIRS)
"""The names of the tasks of :func:`code_tasks`."""


def code_tasks() -> dict[str, Task]:
    """Return the tasks about program code.

    Numerals have no prefix such as ``0x``, so the three tasks on decimal numbers share their inputs
    and only the demonstrations tell them apart.

    Returns:
        ``snake_camel`` and ``camel_snake``: the case of identifiers. ``decimal_hex``,
        ``decimal_octal``, ``decimal_binary`` and their reverses ``hex_decimal``,
        ``octal_decimal`` and ``binary_decimal``: the numbers 16 to 115 in another base.
        ``operator_name``: the function of Python's ``operator`` module for an operator.
        ``python_javascript``: the JavaScript for a built-in, method or library function of
        Python. ``extension_language``: the language of a file extension. Each has
        100 pairs or slightly more, except ``operator_name``, which has 42.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> tasks = tv.tasks.code_tasks()
        >>> tasks["snake_camel"].pairs[0]
        Example(x='get_user_name', y='getUserName')
        >>> [tasks[name].pairs[0].y for name in ("decimal_hex", "decimal_octal", "decimal_binary")]
        ['10', '20', '10000']
    """
    return by_name([mapping_task(name, pairs()) for name, pairs in _PAIRS.items()])
