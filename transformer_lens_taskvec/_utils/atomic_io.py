"""Writing a file whole or not at all, and reading one that may be damaged."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; what is there in the end is moved to ``path``.

    Whatever interrupts it, the path holds the old file or the new one. Processes that write the
    same file at once write apart, and the last one's stays.

    Raises:
        OSError: If the file cannot be written; the message names it.
    """
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        beside.touch()
        mode = beside.stat().st_mode  # safetensors makes files that only their owner may read
        yield beside
        beside.chmod(mode)
        os.replace(beside, path)
    except SafetensorError as error:  # safetensors raises it where Python has OSError
        raise OSError(f"{path} could not be written: {error}") from error
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        beside.unlink(missing_ok=True)


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make the file beside its place, then move it there, as :func:`replacing` does.

    Its folder is made if need be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        write(beside)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8"))


@contextmanager
def reading(place: object, problem: str) -> Iterator[None]:
    """Turn whatever a damaged file makes its reader raise into an error that names the file.

    Args:
        place: The file, and the place in it.
        problem: What is wrong with it, for the user.

    Raises:
        ValueError: In place of other exceptions; the message is ``place: problem: exception``.
        OSError: If the file cannot be read; the message names it.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or str(place) in str(error):
            raise
        raise OSError(f"{place}: {error}") from error
    except (
        SafetensorError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        found = f"no key {error}" if isinstance(error, KeyError) else str(error)
        found = found.encode("utf-8", "backslashreplace").decode()
        raise ValueError(f"{place}: {problem}: {textwrap.shorten(found, 300)}") from error


def read_json(path: Path, problem: str) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: If it is not UTF-8 or not JSON.
        OSError: If it cannot be read.
    """
    with reading(path, problem):
        return json.loads(path.read_text(encoding="utf-8"))
