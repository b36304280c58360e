"""README, pages, docstrings, notebooks and metadata: what they point to exists, and they agree."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import transformer_lens_taskvec as tv

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "tutorials" / "pages").glob("*.md"))
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES]
NEEDS_A_HUB = "your-model.md"
NOTEBOOKS = sorted((ROOT / "tutorials").glob("0*.py"))
NAMESPACES = (
    {"tv": tv}
    | {
        name: getattr(tv, name)
        for name in ("tasks", "vectors", "benchmark", "analysis", "plots", "paper", "lab")
    }
    | {"problems": tv.lab.problems}
)
PUBLIC = {
    name: package
    for package in NAMESPACES.values()
    for name in package.__all__
    if not isinstance(getattr(package, name), ModuleType)
}
named = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)


def said_once(pattern: str, file: str) -> str:
    (found,) = re.findall(pattern, (ROOT / file).read_text(), re.MULTILINE)
    return str(found)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_documented_with_an_example(name: str) -> None:
    package = PUBLIC[name]
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


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", without_code(document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@named
def test_every_link_leads_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", without_code(document.read_text()))
    for target in targets:
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        place = (document.parent / file).resolve() if file else document
        assert place.exists(), target
        assert place.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(place), target


def test_the_readme_links_to_every_page() -> None:
    for page in PAGES:
        assert f"(tutorials/pages/{page.name})" in README.read_text(), page.name


@pytest.mark.parametrize("document", [README, *PAGES], ids=lambda path: path.stem)
def test_names_in_the_documents_are_public(document: Path) -> None:
    text = document.read_text()
    for place, name in re.findall(r"(?<![/\w.])(tv|lab)\.(?!md\b)(\w+)", text):
        assert name in NAMESPACES[place].__all__ or name in NAMESPACES, f"{place}.{name}"
    for place, name in re.findall(
        r"\btv\.(tasks|vectors|benchmark|analysis|plots|paper|lab)\.(\w+)", text
    ):
        assert name in NAMESPACES[place].__all__, f"tv.{place}.{name}"


@pytest.mark.tutorial
@pytest.mark.parametrize(
    "document",
    [page for page in (README, *PAGES) if page.name != NEEDS_A_HUB],
    ids=lambda path: path.stem,
)
def test_the_python_in_a_document_runs_as_it_stands(document: Path) -> None:
    space: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks or document != README
    for block in blocks:
        exec(compile(block, document.name, "exec"), space)


def test_the_readme_is_short() -> None:
    text = re.sub(r"^```bibtex.*?^```", "", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(text.split()) <= 1_200


def test_the_readme_has_one_test_command_for_ci() -> None:
    assert said_once(r"^(pip install .*pytest)$", "README.md")
    assert README.read_text().count("from a clone of this repository:\n\n```bash\npip install") == 2


@pytest.mark.parametrize("document", [*DOCUMENTS, *NOTEBOOKS], ids=lambda path: path.stem)
def test_the_model_is_called_by_its_full_name(document: Path) -> None:
    assert not re.search(r"SmolLM2-135M(?!-Instruct)", document.read_text())


def test_versions_agree_and_so_do_addresses_if_there_is_one() -> None:
    assert said_once(r"^version: (.*)$", "CITATION.cff") == tv.__version__
    patterns = {
        "pyproject.toml": r'^Repository = "(.*)"$',
        "CITATION.cff": r"^repository-code: (.*)$",
        **{f"tutorials/{path.name}": r'^REPOSITORY = "(.+)"$' for path in NOTEBOOKS},
    }
    found = [
        re.findall(pattern, (ROOT / file).read_text(), re.MULTILINE)
        for file, pattern in patterns.items()
    ]
    assert all(addresses == found[0] for addresses in found)


def test_no_file_names_an_address_that_nobody_here_owns() -> None:
    invented = "/".join(["transformer-lens-taskvec"] * 2)
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git repository")
    for file in filter(None, listed.stdout.decode().split("\0")):
        path = ROOT / file
        if path.is_file() and "shipped" not in path.parts:
            assert invented not in path.read_bytes().decode(errors="ignore"), file


def test_an_address_is_written_everywhere_and_taken_out_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tutorials"))
    from build import write_address

    files = ["README.md", "CITATION.cff", "pyproject.toml"]
    files += [f"tutorials/{source.stem}{end}" for source in NOTEBOOKS for end in (".py", ".ipynb")]
    (tmp_path / "tutorials").mkdir()
    for file in files:
        shutil.copy(ROOT / file, tmp_path / file)

    def now() -> dict[str, str]:
        return {file: (tmp_path / file).read_text() for file in files}

    write_address(tmp_path, "")
    without = now()
    write_address(tmp_path, "https://github.com/first/name")
    write_address(tmp_path, "https://github.com/owner/name.git")
    written = now()
    assert all("https://github.com/owner/name" in written[file] for file in files[1:3])
    assert "first/name" not in "".join(written.values())
    for source in NOTEBOOKS:
        colab = "https://colab.research.google.com/github/owner/name/blob/main/tutorials"
        for file in ("README.md", f"tutorials/{source.name}", f"tutorials/{source.stem}.ipynb"):
            assert written[file].count(f"({colab}/{source.stem}.ipynb)") == 1, file
        assert 'REPOSITORY = "https://github.com/owner/name"\n' in written[files[3]]
        assert 'REPOSITORY = \\"https://github.com/owner/name\\"' in written[files[4]]
    write_address(tmp_path, "https://github.com/owner/name/")
    assert now() == written, "writing it again changes nothing"
    write_address(tmp_path, "https://codeberg.org/owner/name")
    assert "colab-badge" not in "".join(now().values()), "Colab opens notebooks from GitHub only"
    write_address(tmp_path, "")
    assert now() == without
    with pytest.raises(ValueError, match="owner/name' is not an address"):
        write_address(tmp_path, "owner/name")


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

    listed = [
        full.rpartition(".")[2] for names in reference.public_names().values() for full in names
    ]
    names = set(listed)
    assert len(names) == len(listed), "a name has one place"
    assert names >= {*PUBLIC}
    assert reference.build(tmp_path / "site") == 0
    page = (tmp_path / "site" / "interventions.html").read_text()
    assert 'id="transformer_lens_taskvec.inject"' in page
    for text in (*NOTEBOOKS, *PAGES):
        built = text.relative_to(ROOT).with_suffix(".html")
        assert (tmp_path / "site" / built).exists()
