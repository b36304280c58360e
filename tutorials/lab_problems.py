"""Every problem of the lab: train, measure, draw, and one table over all of them.

python tutorials/lab_problems.py --out runs/lab             # all of them, one after the other
python tutorials/lab_problems.py bigrams lego --out runs/lab

A problem is trained with its own defaults (a few to twenty minutes on two cores). Run it again to
resume; what is measured already is not measured again. Figures, ``emergence.json`` and
``finding.json`` lie in ``OUT/NAME/figures``, the table of all that is done in ``OUT/table.md``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import pandas as pd

from transformer_lens_taskvec import lab
from transformer_lens_taskvec.lab import encoding_table
from transformer_lens_taskvec.plots import save_figures

NAMES = [name for name in lab.PRESETS if name not in ("paper", "small", "toy")]


def some_of(steps: tuple[int, ...], n: int) -> list[int]:
    """About ``n`` of the steps, the first and the last among them."""
    last = len(steps) - 1
    return [steps[index] for index in sorted({round(last * part / (n - 1)) for part in range(n)})]


def measure(run: lab.Run, folder: Path, n: int, n_checkpoints: int) -> None:
    """Write everything about a run to a folder; of two tasks or more, also its row of the table."""
    finding = run.config.problem.finding(run)
    print(finding)
    finding.save(folder)
    if len(run.tasks) == 1:
        return
    found = lab.measure_emergence(run, steps=some_of(run.steps, n_checkpoints), n=n)
    print(found)
    found.save(folder)
    save_figures(lab.emergence_figures(run, found, n=n), folder)
    row = encoding_table({run.path.name: found})
    row.to_json(folder / "row.json", orient="records", indent=1)


def markdown(table: pd.DataFrame) -> str:
    """The table in Markdown."""
    head = (
        "| problem | TD (untrained, chance) | loss with the own mean, another's (least) "
        "| accuracy: none, own, another's | loss (best oracle) |"
    )
    lines = [head, "|---|---|---|---|---|"]
    lines += [
        (
            f"| {row.problem} | {row.td:.2f} ({row.td_first:.2f}, {row.chance:.2f}) "
            f"| x {row.own_swap:.2f}, x {row.other_swap:.2f} ({row.least_swap:.2f}) "
            f"| {row.accuracy:.2f}, {row.own_accuracy:.2f}, {row.other_accuracy:.2f} "
            f"| {row.loss:.3g} ({row.oracle} {row.oracle_loss:.3g}) |"
        )
        for row in table.itertuples()
    ]
    return "\n".join(lines).replace("x nan, x nan (nan)", "-") + "\n"


def main() -> None:
    """Train, measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("problems", nargs="*", metavar="problem", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="in place of the defaults'")
    parser.add_argument("--n", type=int, default=50, help="sequences per task")
    parser.add_argument("--checkpoints", type=int, default=10, help="how many to measure")
    args = parser.parse_args()
    for name in args.problems or NAMES:
        if name not in NAMES:
            parser.error(f"no problem {name!r}; there are {', '.join(NAMES)}")
        config, folder = lab.PRESETS[name], args.out / name
        if args.steps:
            config = dataclasses.replace(config, steps=args.steps)
        run = lab.train(config, folder, seed=args.seed, device="cpu")
        print(run)
        if not (folder / "figures" / "finding.json").exists():
            measure(run, folder / "figures", args.n, args.checkpoints)
    rows = [json.loads(file.read_text()) for file in sorted(args.out.glob("*/figures/row.json"))]
    table = markdown(pd.DataFrame([row for one in rows for row in one]))
    (args.out / "table.md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
