"""Writing files completely or not at all, and reading files that may be damaged."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident
from typing import Any

from safetensors import SafetensorError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``, and move what is written there to ``path``.

    Whatever interrupts it, ``path`` is the old file or the new one. Processes or threads that write
    the same file at once do not mix; the last one wins.

    Raises:
        OSError: If the file cannot be written; the message names it.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{get_ident()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors makes files private
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, path)
    except SafetensorError as error:  # safetensors raises it for an OSError
        raise OSError(f"{path} could not be written: {error}") from error
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Call ``write`` as :func:`replacing` does, and make the folder if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        write(temporary)


def write_text(path: Path, text: str) -> None:
    """Write a text file completely or not at all."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@contextmanager
def reading(place: object, problem: str) -> Iterator[None]:
    """Turn the exceptions that a damaged file causes into errors that name the file.

    Args:
        place: The file, and the place in it.
        problem: What is wrong, for the user.

    Raises:
        ValueError: For exceptions of the reader, as ``place: problem: exception``.
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
    """Return the content of a JSON file.

    Raises:
        ValueError: If it is not UTF-8 or not JSON.
        OSError: If it cannot be read.
    """
    with reading(path, problem):
        return json.loads(path.read_text(encoding="utf-8"))
