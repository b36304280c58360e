"""Is the task encoded, and is decoding conditional on it? The same numbers for every problem."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from transformer_lens_taskvec.lab.emergence import Emergence

if TYPE_CHECKING:
    import pandas as pd


def encoding_table(found: Mapping[str, Emergence]) -> pd.DataFrame:
    """Return one row per problem: is the task encoded, and is decoding conditional on it?

    Args:
        found: What the checkpoints of each run show, by the problem's name.

    Returns:
        Columns ``problem, step``; ``td``, task decodability at the best layer at the last
        checkpoint, ``td_first`` at the first one (of the untrained model, if it was measured) and
        ``chance``; ``own_swap`` and ``other_swap``, the mean ratio of the query's loss with a
        swapped representation to that without, for the task's own mean and for another's, and
        ``least_swap``, the smallest of the latter, NaN where no loss is left to multiply;
        ``accuracy`` at the query, ``own_accuracy`` and ``other_accuracy`` with these swaps;
        ``loss`` over the late points, and ``oracle``, the best that is not told the task, with its
        ``oracle_loss``.

    Raises:
        ValueError: If there is nothing to show.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> run = lab.shipped_run()
        >>> found = lab.measure_emergence(run, n=11, n_oracle=20, progress=False)
        >>> table = lab.encoding_table({"four bases": found})
        >>> bool((table["td"] > 2 * table["chance"]).all())
        True
    """
    import pandas as pd

    if not found:
        raise ValueError("found is empty; give the Emergence of one run or more")
    rows = []
    for name, one in found.items():
        own, td = torch.eye(len(one.tasks), dtype=torch.bool), one.td[:, one.best_layer()].mean(-1)
        ratio, best = one.swap_ratio[-1], one.oracles.best
        before = torch.tensor([one.swaps[-1].baseline.of(task).accuracy for task in one.tasks])
        accuracy = before[:, None] + one.swaps[-1].delta_accuracy
        rows.append(
            {
                "problem": name,
                "step": one.steps[-1],
                "td": float(td[-1]),
                "td_first": float(td[0]),
                "chance": 1 / len(one.tasks),
                "own_swap": float(ratio[own].mean()),
                "other_swap": float(ratio[~own].mean()),
                "least_swap": float(ratio[~own].min()),
                "accuracy": float(before.mean()),
                "own_accuracy": float(accuracy[own].mean()),
                "other_accuracy": float(accuracy[~own].mean()),
                "loss": float(one.late_loss[-1].nanmean()),
                "oracle": best,
                "oracle_loss": one.oracles.late(best),
            }
        )
    return pd.DataFrame(rows)
