"""Execute the notebooks' sources and write the ``.ipynb`` files beside them.

python tutorials/build.py            # all of them, in full
python tutorials/build.py 01 --fast  # one, with small numbers, without writing it
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import jupytext
from nbclient import NotebookClient

HERE = Path(__file__).parent
SOURCES = sorted(HERE.glob("0*.py"))
_WIDGET = "application/vnd.jupyter.widget-view+json"
STRICT = "import warnings; warnings.filterwarnings('error', module='transformer_lens_taskvec')"


def executed(source: Path, *, fast: bool = False) -> Any:
    """The notebook of a source, run from top to bottom.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell raises, or this package warns.
    """
    notebook = jupytext.read(source)
    os.environ["TASKVEC_FAST"] = "1" if fast else ""
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"  # the figure alone, not plotly with it
    # It is run after a cell that makes warnings errors, and without it when it is shown.
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
    return notebook


def main() -> None:
    """Execute, and write where it was done in full."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", help="beginnings of the names; all by default")
    parser.add_argument("--fast", action="store_true", help="small numbers, nothing written")
    args = parser.parse_args()
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
