"""The rooms of the package: every module can be imported by itself, and few names are flat."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import transformer_lens_taskvec as tv

ROOT = Path(tv.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
    if path.name != "__main__.py"
)
# Other packages are imported once; each module of this one then in a process that has none of it.
ALONE = """
import importlib, os, sys
import matplotlib.pyplot, pandas, safetensors.torch, torch, tqdm.auto, transformer_lens, typer
from transformer_lens.model_bridge import TransformerBridge
assert not any(name.startswith("transformer_lens_taskvec") for name in sys.modules)
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            importlib.import_module(name)
        except BaseException as error:
            print(f"{name}: {error!r}", flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process for each module would take minutes")
def test_every_module_can_be_imported_by_itself() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *MODULES], capture_output=True, text=True, check=True
    )
    assert len(MODULES) > 80 and done.stdout == ""


def test_the_top_level_has_few_rooms_and_few_names() -> None:
    inside = [path for path in ROOT.iterdir() if path.name != "__pycache__"]
    assert sum(path.suffix == ".py" for path in inside) <= 13
    assert sum(path.is_dir() for path in inside) <= 10
    assert len([name for name in tv.__all__ if not name.startswith("plot_")]) <= 56


def test_no_function_shadows_its_module() -> None:
    for package in (
        tv,
        tv.tasks,
        tv.analysis,
        tv.vectors,
        tv.plots,
        tv.paper,
        tv.lab,
        tv.lab.problems,
    ):
        folder = Path(str(package.__file__)).parent
        modules = {path.stem for path in folder.glob("*.py")}
        shadows = [
            name for name in modules & set(package.__all__) if callable(getattr(package, name))
        ]
        assert not shadows, f"{package.__name__}: {shadows}"


def test_the_contract_on_imports_names_every_room() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = ROOT.parent / "pyproject.toml"
    if not project.exists():
        pytest.skip("an installed package has no pyproject.toml")
    contracts = tomllib.loads(project.read_text())["tool"]["importlinter"]["contracts"]
    layers = {room for layer in contracts[0]["layers"] for room in layer.split(" | ")}
    rooms = {path.stem for path in ROOT.iterdir() if path.stem not in ("__init__", "__pycache__")}
    assert layers == rooms - {"__main__", "py"}
