"""README, docstrings, notebooks and metadata: what they point to is there, and they agree."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import transformer_lens_taskvec as tv
from transformer_lens_taskvec import lab

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
NOTEBOOKS = sorted((ROOT / "tutorials").glob("0*.py"))
PUBLIC = [(package, name) for package in (tv, lab) for name in package.__all__]


def said_once(pattern: str, file: str) -> str:
    (found,) = re.findall(pattern, (ROOT / file).read_text(), re.MULTILINE)
    return str(found)


@pytest.mark.parametrize(("package", "name"), PUBLIC, ids=[name for _, name in PUBLIC])
def test_a_public_name_is_documented_with_an_example(package: Any, name: str) -> None:
    thing = getattr(package, name)
    home = sys.modules[getattr(thing, "__module__", "")] if callable(thing) else None
    if home is None or not home.__name__.startswith("transformer_lens_taskvec"):
        # A constant or an alias: a docstring in the source, below it.
        sources = "".join(path.read_text() for path in Path(tv.__file__).parent.rglob("*.py"))
        assert re.search(rf'^{name}\b[^\n]*(\n.*?)??\n?(\)|\}}|\]|")?\n"""', sources, re.M | re.S)
        return
    text = inspect.getdoc(thing) or ""
    assert ">>> " in text
    if not inspect.isfunction(thing):
        return
    described = set(re.findall(r"^    \**(\w+): ", text, re.MULTILINE))
    assert described >= set(inspect.signature(thing).parameters), "an argument is not described"


def test_every_link_in_the_documents_leads_somewhere() -> None:
    for document in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        text = (ROOT / document).read_text()
        anchors = {
            re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        }
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("#"):
                assert target[1:] in anchors, target
            elif "://" not in target:
                file, _, line = target.partition("#")
                assert (ROOT / file).exists(), f"{document}: {target}"
                assert not line or line.startswith("L")


def test_names_in_the_readmes_code_are_public() -> None:
    for name in re.findall(r"\btv\.(\w+)", README):
        assert name in (*tv.__all__, "lab", "plots"), name
    for name in re.findall(r"\blab\.(\w+)", README):
        assert name in lab.__all__, name


@pytest.mark.tutorial
def test_the_readmes_python_runs_as_it_stands() -> None:
    space: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), space)


def test_version_and_address_are_the_same_everywhere() -> None:
    address = said_once(r'^Repository = "(.*)"$', "pyproject.toml")
    assert said_once(r"^version: (.*)$", "CITATION.cff") == tv.__version__
    assert said_once(r"^repository-code: (.*)$", "CITATION.cff") == address
    place = address.removeprefix("https://github.com/")
    for source in NOTEBOOKS:
        text = source.read_text()
        colab = f"https://colab.research.google.com/github/{place}/blob/main/tutorials"
        assert f"({colab}/{source.stem}.ipynb)" in text, source.name
        assert f"git+{address}" in text, source.name
        assert f"({colab}/{source.stem}.ipynb)" in README, source.name


def test_notebooks_are_kept_small_and_have_no_paths_of_a_machine() -> None:
    for source in NOTEBOOKS:
        kept = source.with_suffix(".ipynb")
        text = kept.read_text()
        assert len(text) < 1_000_000, kept.name
        assert not re.search(r"/(home|root|work|Users|opt|tmp)/\w", text), kept.name
        cells = json.loads(text)["cells"]
        assert any("image/png" in json.dumps(cell.get("outputs", [])) for cell in cells)


@pytest.mark.tutorial
@pytest.mark.skipif(importlib.util.find_spec("sphinx") is None, reason="extra `site`")
def test_the_reference_is_built_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tutorials"))
    import reference

    names = {
        full.rpartition(".")[2] for names in reference.public_names().values() for full in names
    }
    assert names >= {*tv.__all__, *lab.__all__}
    assert reference.build(tmp_path / "site") == 0
    page = (tmp_path / "site" / "interventions.html").read_text()
    assert 'id="transformer_lens_taskvec.inject"' in page
    for notebook in NOTEBOOKS:
        assert (tmp_path / "site" / "tutorials" / f"{notebook.stem}.html").exists()
