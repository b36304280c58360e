"""Tasks from JSON files of input-output pairs."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Iterator
from pathlib import Path

from transformer_lens_taskvec.tasks.base import Example, MappingTask, mapping_task

_EXPECTED_SHAPE = '{"x": "y", ...} or [{"input": "x", "output": "y"}, ...]'


def load_mapping(path: str | os.PathLike[str], name: str | None = None) -> MappingTask:
    """Return the task in a JSON file of input-output pairs.

    The file has the shape ``{"x": "y", ...}``, or ``[{"input": "x", "output": "y"}, ...]`` like the
    function-vectors data sets (Todd et al. 2023), where other keys of an entry are ignored. If an
    input is repeated, only its first pair is kept. Texts are not changed, and keep their spaces.

    Args:
        path: A UTF-8 JSON file, with or without a byte order mark.
        name: The task's name in results; by default the file's name without its suffix.

    Returns:
        The task, with its pairs in the file's order.

    Raises:
        ValueError: If the file is not UTF-8, not JSON, of another shape or without pairs, or an
            input or output is not a non-empty string. The message names the file and the line or
            entry.
        OSError: If the file cannot be read.

    Example:
        >>> import pathlib, tempfile
        >>> import transformer_lens_taskvec as tv
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "colours.json")
        ...     _ = path.write_text('{"sky": "blue", "grass": "green"}')
        ...     tv.load_mapping(path)
        MappingTask('colours', 2 pairs: 'sky' -> 'blue', 'grass' -> 'green')
    """
    path = Path(path)
    first: dict[str, Example] = {}
    for example in _examples(path, _parse(path)):
        first.setdefault(example.x, example)
    if not first:
        raise ValueError(f"{path} has no pairs; give at least one, as {_EXPECTED_SHAPE}")
    return mapping_task(path.stem if name is None else name, first.values())


def _parse(path: Path) -> object:
    """Return the content of a JSON file, objects as tuples of (key, value) and arrays as lists."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: not UTF-8 ({error.reason}); convert the file to UTF-8"
        ) from error
    try:
        # A dict would silently keep the last of several equal keys; tuples keep them all.
        return json.loads(text, object_pairs_hook=tuple)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error
    except ValueError as error:
        raise ValueError(f"{path}: a number is too long to read ({error})") from error
    except RecursionError as error:
        raise ValueError(
            f"{path}: the JSON is nested too deeply to read; expected {_EXPECTED_SHAPE}"
        ) from error


def _examples(path: Path, content: object) -> Iterator[Example]:
    if isinstance(content, tuple):
        for index, (x, y) in enumerate(content):
            yield Example(_text(path, index, "input", x), _text(path, index, "output", y))
    elif isinstance(content, list):
        for index, entry in enumerate(content):
            fields = dict(entry) if isinstance(entry, tuple) else {}
            if "input" not in fields or "output" not in fields:
                raise _entry_error(
                    path,
                    index,
                    f"expected an object with an input and an output, got {_describe(entry)}",
                )
            yield Example(
                _text(path, index, "input", fields["input"]),
                _text(path, index, "output", fields["output"]),
            )
    else:
        raise ValueError(f"{path}: expected {_EXPECTED_SHAPE}, got {_describe(content)}")


def _text(path: Path, index: int, side: str, value: object) -> str:
    if not isinstance(value, str):
        raise _entry_error(path, index, f"the {side} must be a string, got {_describe(value)}")
    if not value.strip():
        raise _entry_error(path, index, f"the {side} is empty; give it a text or remove the entry")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _entry_error(
            path,
            index,
            f"the {side} {reprlib.repr(value)} contains half of a surrogate pair; remove it",
        ) from error
    return value


def _entry_error(path: Path, index: int, problem: str) -> ValueError:
    return ValueError(f"{path}, entry {index} (counted from 0): {problem}")


def _describe(value: object) -> str:
    """Return what a parsed JSON value is, in JSON's terms."""
    if isinstance(value, tuple):
        keys = ", ".join(reprlib.repr(key) for key, _ in value[:4])
        return f"an object with the keys {keys}" if value else "an empty object"
    if isinstance(value, list):
        return f"an array of length {len(value)}"
    # ``true`` and ``null`` rather than Python's True and None; long strings are truncated.
    return reprlib.repr(value) if isinstance(value, str) else json.dumps(value)
