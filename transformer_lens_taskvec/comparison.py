"""Is one way of answering better than others, on the same episodes?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch

from transformer_lens_taskvec.evaluate import Scores
from transformer_lens_taskvec.shown import Shown
from transformer_lens_taskvec.statistics import bootstrap_interval, holm


@dataclass(frozen=True, repr=False)
class Comparison(Shown):
    """Differences in accuracy on the same episodes, a row a task and other way.

    Attributes:
        differences: ``task, against, accuracy, other, other_low, other_high, difference, low, high,
            p, p_holm, n``: both accuracies, the other's with Wilson's 95 % interval; their
            difference with its 95 % interval by a bootstrap over episodes; the p-value of McNemar's
            exact test, and the same after Holm's correction over all rows.
    """

    differences: pd.DataFrame

    def to_frame(self) -> pd.DataFrame:
        """The differences."""
        return self.differences

    def table(self) -> pd.DataFrame:
        """The other ways' accuracies with their intervals, a row a task and a column a way."""
        written = [
            f"{row.other:.2f} [{row.other_low:.2f}, {row.other_high:.2f}]"
            for row in self.differences.itertuples()
        ]
        frame = self.differences.assign(written=written)
        wide = frame.pivot(index="task", columns="against", values="written")
        order = frame.task.drop_duplicates(), frame.against.drop_duplicates()
        return wide.loc[order].rename_axis(columns=None)

    def hardest(self) -> pd.DataFrame:
        """For each task the row of the other way that answered most."""
        order = self.differences.sort_values("difference", kind="stable")
        return order.groupby("task", sort=False).head(1).sort_index().reset_index(drop=True)

    def __repr__(self) -> str:
        lines = [
            f"{row.task}: {row.difference:+.2f} [{row.low:+.2f}, {row.high:+.2f}] against "
            f"{row.against}, p = {row.p_holm:.2g}"
            for row in self.hardest().itertuples()
        ]
        return "Comparison(the hardest of each task: " + "; ".join(lines) + ")"


def compare(
    scores: Scores,
    against: Scores | Mapping[str, Scores],
    *,
    n_resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare accuracies episode by episode, task by task.

    Args:
        scores: The scores in question.
        against: Scores of the same episodes; or several, by name, such as those of controls.
        n_resamples: Of the bootstrap over episodes.
        seed: Seed of the bootstrap.

    Returns:
        Paired differences with intervals and corrected p-values.

    Raises:
        ValueError: If the episodes differ, or nothing is given to compare with.
    """
    from scipy.stats import binomtest  # half a second, that most imports do without

    others = {"baseline": against} if isinstance(against, Scores) else dict(against)
    if not others:
        raise ValueError("there is nothing to compare with; give at least one other Scores")
    rows = []
    for name, other in others.items():
        if other.tasks != scores.tasks or not torch.equal(other.labels, scores.labels):
            raise ValueError(f"the scores of {name!r} are of other episodes")
        gain = scores.correct.float() - other.correct.float()
        for index, task in enumerate(scores.tasks):
            own = gain[scores.labels == index]
            other_low, other_high = other.of(task).interval()
            better, worse = int((own > 0).sum()), int((own < 0).sum())
            low, high = bootstrap_interval(own, n_resamples=n_resamples, seed=seed).tolist()
            p = binomtest(better, better + worse).pvalue if better + worse else 1.0
            rows.append(
                {
                    "task": task,
                    "against": name,
                    "accuracy": scores.of(task).accuracy,
                    "other": other.of(task).accuracy,
                    "other_low": other_low,
                    "other_high": other_high,
                    "difference": float(own.mean()),
                    "low": low,
                    "high": high,
                    "p": float(p),
                    "n": len(own),
                }
            )
    frame = pd.DataFrame(rows)
    adjusted = holm(torch.tensor(frame.p.to_numpy(), dtype=torch.float64)).tolist()
    frame.insert(list(frame).index("p") + 1, "p_holm", adjusted)
    return Comparison(frame)
