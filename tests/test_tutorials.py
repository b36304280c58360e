"""The notebooks run from top to bottom, and those with outputs are of the sources as they are."""

from __future__ import annotations

import sys
from pathlib import Path

import jupytext
import pytest

TUTORIALS = Path(__file__).parents[1] / "tutorials"
SOURCES = sorted(TUTORIALS.glob("0*.py"))


@pytest.mark.tutorial
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_runs(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(TUTORIALS), *sys.path])
    from build import executed

    notebook = executed(source, fast=True)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.parametrize(
    "source",
    [source for source in SOURCES if source.with_suffix(".ipynb").exists()],
    ids=lambda path: path.stem,
)
def test_the_outputs_are_of_the_source(source: Path) -> None:
    now, kept = jupytext.read(source), jupytext.read(source.with_suffix(".ipynb"))
    assert [(c.cell_type, c.source) for c in now.cells] == [
        (c.cell_type, c.source) for c in kept.cells
    ]
    assert all(cell.execution_count for cell in kept.cells if cell.cell_type == "code")
    assert source.with_suffix(".ipynb").stat().st_size < 1_000_000
