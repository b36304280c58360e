"""Build the reference: README, notebooks with their outputs, and a page a module from docstrings.

python tutorials/reference.py               # to site/; needs the extra `site`
python tutorials/reference.py --out public  # elsewhere

There is no text here. Any warning is an error, such as a role in a docstring that leads nowhere.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shutil
import sys
import tempfile
from pathlib import Path

from sphinx.cmd.build import build_main

import transformer_lens_taskvec as tv
from transformer_lens_taskvec import lab

ROOT = Path(__file__).parents[1]
CONF = r"""
project = html_title = "transformer-lens-taskvec"
copyright = "the authors of transformer-lens-taskvec"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
nb_execution_mode = "off"
myst_heading_anchors = 3
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
# The interactive figure of a notebook is for notebooks.
suppress_warnings = ["mystnb.unknown_mime_type"]
nitpicky = True
# Types of other packages have no pages here.
nitpick_ignore_regex = [("py:.*", r"(?!transformer_lens_taskvec\.).*")]
"""
MODULES = {
    "tasks": "Tasks",
    "prompts": "Prompts",
    "models": "Models",
    "collect": "Activations",
    "vectors": "Task vectors",
    "interventions": "Interventions",
    "evaluate": "Scores",
    "generate": "Generation",
    "controls": "Controls",
    "comparison": "Comparisons",
    "sweeps": "Layer sweeps",
    "analyses": "Perturbation and steering",
    "heads": "Heads and function vectors",
    "decodability": "Decodability",
    "fits": "Decodability and accuracy",
    "experiment": "The whole experiment",
    "studies": "The paper's studies",
    "checkpoints": "Studies over checkpoints",
    "prompting": "Instructions",
    "finetune": "Finetuning by depth",
    "plots": "Figures",
    "lab": "The lab",
}
"""Modules in the order of the pages, with the pages' titles."""
BESIDE = {
    "collect": ["Source"],
    "prompts": ["AnyEpisode"],
    "interventions": ["Mode", "InSubspace"],
    "decodability": ["Method"],
    "tasks": ["Sentence", "MappingTask"],
}
"""Types in the signatures of public functions that are not at the top level themselves."""


def public_names() -> dict[str, list[str]]:
    """The full names of what is public, by module.

    Raises:
        ValueError: If a public name is of a module that has no page.
    """
    found = {
        module: [f"{tv.__name__}.{module}.{name}" for name in BESIDE.get(module, [])]
        for module in MODULES
    }
    for package in (tv, lab):
        for name in package.__all__:
            module = "lab" if package is lab else _module_of(name)
            if module not in found:
                raise ValueError(f"{name} is of {module}, which has no page")
            found[module].append(f"{package.__name__}.{name}")
    return found


def _module_of(name: str) -> str:
    """The module within the package in which a public name can be found."""
    for module in MODULES:
        whole = importlib.import_module(f"{tv.__name__}.{module}")
        if getattr(whole, name, None) is getattr(tv, name) and _is_home(whole.__name__, name):
            return module
    return "nowhere"


def _is_home(module: str, name: str) -> bool:
    """Whether a class or function was defined in the module or below it; constants are."""
    origin = getattr(getattr(tv, name), "__module__", module)
    constant = name.isupper()
    return constant or origin == module or origin.startswith(f"{module}.")


def page(module: str, title: str, names: list[str]) -> str:
    """The source of a module's page: its docstring, and those of its public names."""
    whole = importlib.import_module(f"{tv.__name__}.{module}")
    package = lab.__name__ if module == "lab" else tv.__name__
    lines = [f".. currentmodule:: {package}", ""]
    lines += [title, "=" * len(title), "", whole.__doc__ or "", ""]
    for full in names:
        place, _, name = full.rpartition(".")
        thing = getattr(sys.modules[place], name)
        kind = "class" if isinstance(thing, type) else "function"
        if not callable(thing):  # its docstring stands below it, in its own module
            kind, full = "data", f"{whole.__name__}.{name}"
        lines += [f".. auto{kind}:: {full}", *(["   :no-value:"] if kind == "data" else []), ""]
    return "\n".join(lines)


def contents(caption: str, pages: list[str]) -> str:
    """A hidden table of contents, which the theme shows at the side."""
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```", ""])


def write_sources(source: Path) -> None:
    """Write what Sphinx reads."""
    for notebook in sorted((ROOT / "tutorials").glob("0*.ipynb")):
        (source / "tutorials").mkdir(exist_ok=True)
        shutil.copy(notebook, source / "tutorials")
    shutil.copytree(ROOT / "tutorials" / "figures", source / "tutorials" / "figures")
    names = public_names()
    for module, title in MODULES.items():
        (source / f"{module}.rst").write_text(page(module, title, names[module]))
    for extra in ("CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / extra, source)

    def kept(link: re.Match[str]) -> str:
        """A link into the repository stays where the site has the file, and else is its text."""
        text, target = link.groups()
        inside = "://" in target or target.startswith("#") or (source / target).is_file()
        return link.group() if inside else text

    readme = re.sub(r"(?<!!)\[([^\]]+)\]\(([^)]+)\)", kept, (ROOT / "README.md").read_text())
    notebooks = sorted((source / "tutorials").glob("0*.ipynb"))
    tables = [
        contents("Tutorials", [f"tutorials/{notebook.stem}" for notebook in notebooks]),
        contents("Reference", list(MODULES)),
        contents("Project", ["CHANGELOG", "CONTRIBUTING"]),
    ]
    (source / "index.md").write_text("\n".join([readme, *tables]))
    (source / "conf.py").write_text(CONF)


def build(out: Path) -> int:
    """Build the pages; returns Sphinx' exit status."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        write_sources(source)
        return build_main(["-q", "-W", "--keep-going", "-b", "html", folder, str(out)])


def main() -> None:
    """Build, and end with Sphinx' exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "site")
    sys.exit(build(parser.parse_args().out))


if __name__ == "__main__":
    main()
