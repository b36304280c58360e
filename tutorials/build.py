"""Execute the notebooks' sources and write the ``.ipynb`` files next to them.

python tutorials/build.py                   # all of them, in full
python tutorials/build.py 01 --fast         # one, with small numbers, without writing it
python tutorials/build.py --repository URL  # execute nothing; write the repository's address
"""

from __future__ import annotations

import argparse
import os
import re
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
HERE = ROOT / "tutorials"
SOURCES = sorted(HERE.glob("0*.py"))
_WIDGET = "application/vnd.jupyter.widget-view+json"
STRICT = "import warnings; warnings.filterwarnings('error', module='transformer_lens_taskvec')"


def executed(source: Path, *, fast: bool = False) -> Any:
    """Return the notebook of a source, run from top to bottom.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell raises, or this package warns.
    """
    notebook = jupytext.read(source)
    os.environ["TASKVEC_FAST"] = "1" if fast else ""
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"  # the figure alone, not plotly with it
    # The cell that turns warnings into errors runs first and is not kept.
    first = notebook.cells[0].copy()
    first.update(cell_type="code", source=STRICT, outputs=[], execution_count=None)
    notebook.cells.insert(0, first)
    NotebookClient(notebook, timeout=1800, kernel_name="python3", store_widget_state=False).execute(
        cwd=str(HERE)
    )
    del notebook.cells[0]
    for number, cell in enumerate(c for c in notebook.cells if c.cell_type == "code"):
        cell.execution_count = number + 1
        # A progress bar that has cleaned up after itself is an empty widget.
        cell.outputs = [output for output in cell.outputs if _WIDGET not in output.get("data", {})]
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number + 1
            if "text" in output:  # a warning names the temporary file of its cell
                output.text = re.sub(r"\S*ipykernel_\d+\S*\.py:\d+: ", "", output.text)
    return notebook


_BADGE = r"\[!\[Open in Colab\]\([^)]*\)\]\([^)]*\)"
_COLAB = "https://colab.research.google.com"


def write_address(root: Path, url: str) -> None:
    """Write the repository's address wherever readers look for it, in place of any earlier one.

    These places are the Colab badges in the README and the notebooks, ``REPOSITORY`` in the
    notebooks' first cells, ``CITATION.cff`` and ``[project.urls]``. No notebook is executed.

    Args:
        root: The folder of the repository.
        url: For example ``https://github.com/owner/name``; the empty string removes the address.
            Badges are for GitHub only, since Colab opens notebooks from there.

    Raises:
        ValueError: If ``url`` is not a plain ``https`` address.
    """
    url = url.removesuffix("/").removesuffix(".git")
    if url and not re.fullmatch(r"https://[\w.-]+(/[\w.-]+)+", url):
        raise ValueError(
            f"--repository {url!r} is not an address. Give one such as https://github.com/owner/name"
        )
    for source in sorted((root / "tutorials").glob("0*.py")):
        badge = _badge(url, source.stem)
        text = _with_badge(source.read_text(), badge, comment="# ")
        source.write_text(_with_repository(text, url))
        notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
        title, first = notebook.cells[:2]
        title.source = _with_badge(title.source, badge)
        first.source = _with_repository(first.source, url)
        nbformat.write(notebook, source.with_suffix(".ipynb"))

    def linked(link: re.Match[str]) -> str:
        badge = _badge(url, link[2])
        return f"{link[1]} {badge}" if badge else link[1]

    readme = root / "README.md"
    notebooks = rf"^(- \[[^\]]+\]\(tutorials/(0\w+)\.ipynb\))(?: {_BADGE})?"
    readme.write_text(re.sub(notebooks, linked, readme.read_text(), flags=re.M))
    _set_line(root / "CITATION.cff", "license:", f"repository-code: {url}" if url else "")
    _set_line(root / "pyproject.toml", "[project.urls]", f'Repository = "{url}"' if url else "")


def _badge(url: str, notebook: str) -> str:
    """Return a notebook's Colab badge, or nothing if it is not on GitHub."""
    place = url.removeprefix("https://github.com/")
    if place == url:
        return ""
    target = f"{_COLAB}/github/{place}/blob/main/tutorials/{notebook}.ipynb"
    return f"[![Open in Colab]({_COLAB}/assets/colab-badge.svg)]({target})"


def _with_badge(text: str, badge: str, *, comment: str = "") -> str:
    """Put the badge below the title of a notebook, whose lines may be comments."""
    blank = comment.rstrip()
    text = re.sub(rf"\n{blank}\n{comment}{_BADGE}", "", text)
    below = f"\n{blank}\n{comment}{badge}" if badge else ""
    return re.sub(rf"^{comment}# .*", lambda title: title[0] + below, text, count=1, flags=re.M)


def _with_repository(text: str, url: str) -> str:
    return re.sub(r'^REPOSITORY = "[^"]*"', f'REPOSITORY = "{url}"', text, flags=re.M)


def _set_line(path: Path, above: str, line: str) -> None:
    """Put a line below the one that begins with ``above``, in place of an earlier one."""
    key = ("repository-code:", "Repository =")
    kept = [old for old in path.read_text().splitlines() if not old.startswith(key)]
    place = next(number for number, old in enumerate(kept) if old.startswith(above)) + 1
    kept[place:place] = [line] if line else []
    path.write_text("\n".join(kept) + "\n")


def main() -> None:
    """Execute the notebooks and write those that ran in full, or write the address."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("only", nargs="*", help="beginnings of the names; by default all")
    parser.add_argument("--fast", action="store_true", help="small numbers, nothing written")
    parser.add_argument("--repository", metavar="URL", help="write this address and run nothing")
    args = parser.parse_args()
    if args.repository is not None:
        write_address(ROOT, args.repository)
        return
    for source in SOURCES:
        if args.only and not source.name.startswith(tuple(args.only)):
            continue
        start = time.perf_counter()
        notebook = executed(source, fast=args.fast)
        print(f"{source.name}: {time.perf_counter() - start:.0f} s", flush=True)
        if not args.fast:
            jupytext.write(notebook, source.with_suffix(".ipynb"), fmt="ipynb")


if __name__ == "__main__":
    main()
