"""Text files line by line, with errors that name the file and the line; hashes; sizes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

_MAX_LINE_BYTES = 1_000_000


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of each line, without its line ending.

    Args:
        path: A UTF-8 text file, with or without a byte order mark.

    Raises:
        ValueError: If a line is over 1 MB or not UTF-8.
        OSError: If the file cannot be read.
    """
    with path.open("rb") as file:
        number = 0
        # A file without line breaks cannot fill the memory.
        while raw := file.readline(_MAX_LINE_BYTES + 1):
            number += 1
            if len(raw) > _MAX_LINE_BYTES:
                raise line_error(
                    path, number, f"is longer than {_MAX_LINE_BYTES:,} bytes; is this a text file?"
                )
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise line_error(
                    path, number, f"is not UTF-8 ({error.reason}); convert the file to UTF-8"
                ) from error
            yield number, line.rstrip("\r\n")


def line_error(path: Path, number: int, problem: str) -> ValueError:
    """Return the error for a malformed line."""
    return ValueError(f"{path}, line {number}: the line {problem}")


def stable_hash(*parts: str | bytes) -> int:
    """Return a signed 64-bit hash of the parts, the same in every process.

    Example:
        >>> stable_hash("ab", "c") == stable_hash("a", "bc")
        False
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        some = part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass")
        digest.update(len(some).to_bytes(8, "big") + some)
    return int.from_bytes(digest.digest(), "big", signed=True)


def spelled_size(queries: Sequence[int], episodes: Sequence[int]) -> str:
    """Return the numbers of distinct queries and of episodes of some tasks as text.

    Example:
        >>> spelled_size([8], [40]), spelled_size([40, 40], [40, 40])
        ('n = 8 queries (40 episodes)', 'n = 40 queries per task')
        >>> spelled_size([40, 8], [40, 40])
        'n = 8 to 40 queries (40 episodes) per task'
    """
    asked, run = (
        str(min(sizes)) if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
        for sizes in (queries, episodes)
    )
    repeated = "" if list(queries) == list(episodes) else f" ({run} episodes)"
    return f"n = {asked} queries{repeated}" + (" per task" if len(queries) > 1 else "")
