"""Reading the data files of the tasks in this package."""

from __future__ import annotations

from importlib import resources


def read_text(name: str) -> str:
    """Return the text of a file in ``tasks/data``."""
    file = resources.files("transformer_lens_taskvec.tasks") / "data" / name
    return file.read_text(encoding="utf-8")


def read_pairs(name: str) -> list[tuple[str, str]]:
    """Return the pairs of a two-column table, without the comment in its first line if any."""
    lines = read_text(f"{name}.tsv").splitlines()
    rows = [line.split("\t") for line in lines[lines[0].startswith("# ") :]]
    return [(x, y) for x, y in rows]
