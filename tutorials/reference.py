"""Build the reference: README, pages, notebooks with their outputs, and docstrings by module.

python tutorials/reference.py               # to site/; needs the extra `site`
python tutorials/reference.py --out public  # elsewhere

There is no text here. Any warning is an error, such as a role in a docstring that leads nowhere.
"""

from __future__ import annotations

import argparse
import importlib
import posixpath
import re
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from sphinx.cmd.build import build_main

import transformer_lens_taskvec as tv

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
# What belongs to other packages, what is private and type variables have no pages here.
nitpick_ignore_regex = [("py:.*", r"(?!transformer_lens_taskvec\.).*|.*\.(_\w+|[A-Z])")]

# Docstrings name public things without their namespace, and are to be found by that name.
def by_name(app, env, node, content):
    if node.get("refdomain") != "py" or node["reftype"] == "attr":
        return None
    node["refspecific"] = True
    target = node["reftarget"].removeprefix("transformer_lens_taskvec.")
    return env.get_domain("py").resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], target, node, content
    )

def setup(app):
    app.connect("missing-reference", by_name)
"""
MODULES = {
    "loading": "Models",
    "tasks": "Tasks",
    "prompts": "Prompts",
    "activations": "Activations",
    "vectors": "Vectors",
    "interventions": "Interventions",
    "scoring": "Scores",
    "planning": "Plans",
    "generation": "Generation",
    "controls": "Controls",
    "analysis": "Analyses",
    "experiment": "The main job",
    "benchmark": "Methods side by side",
    "plots": "Figures",
    "paper": "The paper's studies",
    "lab": "The lab",
}
"""Modules in the order of the pages, with the pages' titles."""
PAGES = (
    "your-model",
    "architectures",
    "methods",
    "results",
    "controls",
    "which-vector",
    "lab",
    "toy-model",
    "extending",
    "comparison",
    "faq",
    "glossary",
)
"""The pages of the guide, in their order."""
HOMES = {"models": "loading", "_utils": "scoring"}
"""Modules whose public names stand on the page of another."""
NAMESPACES = (
    *(tv, tv.tasks, tv.vectors, tv.benchmark, tv.analysis, tv.plots, tv.paper),
    *(tv.lab, tv.lab.problems),
)
"""Where public names are looked for; one that is in several is documented under the first."""
ALONGSIDE = {
    "loading": ["models.HookedModel"],
    "activations": ["activations.Source"],
    "prompts": ["prompts.AnyEpisode", "prompts.ChatTemplate", "prompts.permute_mapping"],
    "interventions": [
        "interventions.Mode",
        "interventions.InSubspace",
        "interventions.Separator",
        "interventions.variants.PromptHook",
        "models.tokens.PromptBatch",
        "models.tokens.Each",
        "interventions.modes.AddMapped",
        "interventions.modes.KeepNorm",
    ],
    "generation": ["generation.Continuations", "models.decoding.Stop"],
    "scoring": [
        "_utils.metrics.Measure",
        "_utils.metrics.Answered",
        "_utils.errors.Errors",
        "_utils.errors.Reply",
    ],
    "vectors": [
        "vectors.all_tokens.Origin",
        "vectors.sparse.Reconstruction",
    ],
    "controls": ["controls.ControlVectors"],
    "analysis": ["analysis.classifiers.Readout"],
    "lab": [
        "lab.model.ModelSize",
        "lab.model.LabTransformer",
        "lab.problems.mimo.finding.Equaliser",
        "lab.problems.bigrams.formula.HasBigrams",
    ],
}
"""Types in the signatures of public functions that are in no namespace themselves."""


def public_names() -> dict[str, list[str]]:
    """Return the full names of what is public, by the module on whose page it stands.

    Raises:
        ValueError: If a public name belongs to a module that has no page.
    """
    found = {
        module: [f"{tv.__name__}.{name}" for name in ALONGSIDE.get(module, [])]
        for module in MODULES
    }
    placed: set[str] = set()
    for package in NAMESPACES:
        for name in package.__all__:
            if name in placed or isinstance(getattr(package, name), ModuleType):
                continue
            placed.add(name)
            found[_module_of(package, name)].append(f"{package.__name__}.{name}")
    return found


def _is_defined(thing: object) -> bool:
    """Whether it is a class or function of this library, not a constant or an alias."""
    return str(getattr(thing, "__module__", "")).startswith(f"{tv.__name__}.") and callable(thing)


def _module_of(package: ModuleType, name: str) -> str:
    """Return the module on whose page a public name stands."""
    thing = getattr(package, name)
    home = thing.__module__ if _is_defined(thing) else _first_with(name, thing)
    module = home.removeprefix(f"{tv.__name__}.").partition(".")[0]
    module = HOMES.get(module, module)
    if module not in MODULES:
        raise ValueError(f"{name} belongs to {home or 'no module'}, which has no page")
    return module


def _first_with(name: str, thing: object) -> str:
    """Return the first module, in the order of the pages, that holds a constant."""
    for module in MODULES:
        whole = importlib.import_module(f"{tv.__name__}.{module}")
        if getattr(whole, name, None) is thing:
            return whole.__name__
    return ""


def _source_of(full: str) -> str:
    """Return where a constant is assigned, with its docstring below, given its public name."""
    place, _, name = full.rpartition(".")
    thing = getattr(importlib.import_module(place), name)
    for module in sorted(sys.modules):
        whole = sys.modules[module]
        if module.startswith(f"{tv.__name__}.") and getattr(whole, name, None) is thing:
            source = Path(whole.__file__ or "").read_text()
            if re.search(rf"^{name}\b.* = ", source, re.MULTILINE):
                return f"{module}.{name}"
    raise ValueError(f"{full} is assigned in no module")


def page(module: str, title: str, names: list[str]) -> str:
    """Return the source of a module's page: its docstring, and those of its public names."""
    whole = importlib.import_module(f"{tv.__name__}.{module}")
    lines = [f".. currentmodule:: {tv.__name__}", ""]
    lines += [title, "=" * len(title), "", whole.__doc__ or "", ""]
    for full in names:
        place, _, name = full.rpartition(".")
        thing = getattr(importlib.import_module(place), name)
        kind = "class" if isinstance(thing, type) else "function"
        options = []
        if not _is_defined(thing):
            kind, full, options = "data", _source_of(full), ["   :no-value:"]
        lines += [f".. auto{kind}:: {full}", *options, ""]
    return "\n".join(lines)


def contents(caption: str, pages: list[str]) -> str:
    """A hidden table of contents, which the theme shows at the side."""
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```", ""])


def write_sources(source: Path) -> None:
    """Write what Sphinx reads."""
    tutorials = ROOT / "tutorials"
    shutil.copytree(tutorials / "figures", source / "tutorials" / "figures")
    shutil.copytree(tutorials / "pages", source / "tutorials" / "pages")
    for notebook in sorted(tutorials.glob("0*.ipynb")):
        shutil.copy(notebook, source / "tutorials")
    names = public_names()
    for module, title in MODULES.items():
        (source / f"{module}.rst").write_text(page(module, title, names[module]))
    for extra in ("CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / extra, source)
    pages = [f"tutorials/pages/{name}" for name in PAGES]
    notebooks = [f"tutorials/{path.stem}" for path in sorted((source / "tutorials").glob("0*"))]
    tables = [
        contents("Guide", pages),
        contents("Tutorials", notebooks),
        contents("Reference", list(MODULES)),
        contents("Project", ["CHANGELOG", "CONTRIBUTING"]),
    ]
    shutil.copy(ROOT / "README.md", source / "index.md")
    for text in (*source.glob("*.md"), *source.glob("tutorials/pages/*.md")):
        text.write_text(_with_site_links(text, source))
    with (source / "index.md").open("a") as index:
        index.write("\n".join(["", *tables]))
    (source / "conf.py").write_text(CONF)


def _with_site_links(text: Path, source: Path) -> str:
    """Return a page whose links to files that the site does not have are their text."""

    def kept(link: re.Match[str]) -> str:
        said, target = link.groups()
        file, hash_mark, anchor = target.partition("#")
        if "://" in target or not file:
            return link.group()
        if (text.parent / file).is_file():
            return f"[{said}]({posixpath.normpath(file)}{hash_mark}{anchor})"
        return said

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)]+)\)", kept, text.read_text())


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
