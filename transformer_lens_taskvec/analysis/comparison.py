"""Paired comparisons of accuracy under several conditions on the same queries.

The unit is the distinct query. Where a query has several episodes, its value is their mean. Where
episodes share their demonstrations, the set of demonstrations is a unit as well: its queries are
answered right or wrong together, so that their differences are not independent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec._utils.statistics import (
    effective_size,
    holm,
    means_by_query,
    numbered,
    paired_interval,
)
from transformer_lens_taskvec.scoring import Scores


@dataclass(frozen=True, repr=False)
class Comparison(Shown):
    """Differences in accuracy on the same queries, one row per task and other condition.

    Attributes:
        differences: ``task, against, accuracy, other, difference, low, high, p, p_holm, n``,
            ``n_distinct`` and ``accuracy_low``, ``accuracy_high``, ``other_low``, ``other_high``:
            both accuracies with Wilson's 95 % intervals; their difference with Tango's 95 %
            interval for paired shares; the p-value of McNemar's exact test, the sign test on the
            queries' differences, without and with Holm's correction over all rows; the number of
            episodes and of distinct queries, which is what intervals and tests count. Further
            metrics that both have follow, each as ``NAME`` and ``NAME_other``. Where demonstrations
            are shared, ``n_sets`` is the number of sets, intervals are over queries and sets, and p
            is the larger of those of the sign tests over queries and over sets.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model, tasks = tv.load_model("toy"), tv.bitwise_tasks(null=False)
        >>> comparison = tv.run_experiment(model, tasks, n_shots=4, n=12).comparison
        >>> comparison.table().columns.tolist()[:4]
        ['accuracy', 'nothing injected', 'random', 'other task']
        >>> hardest = comparison.hardest()  # for each task, the condition with most right answers
        >>> bool((hardest.difference > 0).all())
        True
    """

    differences: pd.DataFrame

    def to_frame(self) -> pd.DataFrame:
        """Return the differences."""
        return self.differences

    def table(self) -> pd.DataFrame:
        """Return accuracies with their intervals: a row per task, a column per condition.

        The last column, ``n_distinct``, is the number of distinct queries.
        """
        columns: dict[str, dict[str, Any]] = {"accuracy": {}}
        sizes = dict(zip(self.differences.task, self.differences.n_distinct, strict=True))
        for row in self.differences.to_dict("records"):
            for name, kind in (("accuracy", "accuracy"), (row["against"], "other")):
                low, high = row[f"{kind}_low"], row[f"{kind}_high"]
                cell = f"{row[kind]:.2f} [{low:.2f}, {high:.2f}]"
                columns.setdefault(name, {})[row["task"]] = cell
        return pd.DataFrame({**columns, "n_distinct": sizes}).rename_axis("task")

    def hardest(self) -> pd.DataFrame:
        """Return, for each task, the row of the other condition with the highest accuracy."""
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
) -> Comparison:
    """Return paired differences in accuracy by task, with intervals and corrected p-values.

    Args:
        scores: The scores of interest.
        against: Other scores of the same queries in the same order, or a mapping of them by name,
            such as those of controls. The demonstrations may differ; where both share them, it
            must be the same episodes that do.

    Raises:
        ValueError: If the queries or ``stop`` differ, demonstrations are shared by other episodes,
            a task has no scores, or nothing is given to compare with.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> sizes = {"train": 10, "test": 10}
        >>> sets = tv.sample_splits(tv.bitwise_tasks(null=False), sizes, n_shots=4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, sets["train"]))
        >>> xor = [e for e in tv.zero_shot(sets["test"]) if e.task == "XOR"]
        >>> edits = [vectors.inject(task, layer=1) for task in ("XOR", "OR")]
        >>> own, other = tv.evaluate_many(model, xor, edits)
        >>> comparison = tv.compare(own, {"vector of OR": other})
        >>> comparison.to_frame()[["task", "against", "n"]].values.tolist()
        [['XOR', 'vector of OR', 10]]
        >>> bool(comparison.differences.difference[0] > 0)
        True
    """
    others = {"baseline": against} if isinstance(against, Scores) else dict(against)
    if not others:
        raise ValueError("nothing to compare with; give at least one other Scores")
    rows = []
    for name, other in others.items():
        same = other.tasks == scores.tasks and torch.equal(other.labels, scores.labels)
        if not (same and torch.equal(other.queries, scores.queries)):
            raise ValueError(
                f"the scores of {name!r} are of other queries; evaluate the same ones, in the same "
                "order"
            )
        if other.stop != scores.stop:
            raise ValueError(
                f"the scores of {name!r} have stop={other.stop!r}, and those they are compared "
                f"with stop={scores.stop!r}; evaluate both with the same"
            )
        for task in scores.tasks:
            own, their = scores.of(task), other.of(task)
            if not len(own):
                raise ValueError(f"there are no scores of task {task!r}; compare its episodes too")
            row: dict[str, Any] = {"task": task, "against": name}
            for kind, of in (("accuracy", own), ("other", their)):
                row[kind] = of.accuracy
                row[f"{kind}_low"], row[f"{kind}_high"] = of.interval()
            sets = _sets(own, their, name)
            apart = own.correct.double() - their.correct.double()
            gain = means_by_query(apart, own.queries)
            row["difference"] = float(gain.mean())
            n, df = effective_size(apart, own.queries, sets)
            row["low"], row["high"] = paired_interval(gain, n=float(n), df=df)
            row["p"] = _sign_test(gain)
            row["n"], row["n_distinct"] = len(own), own.n_distinct
            if sets is not None:
                row["p"] = max(row["p"], _sign_test(means_by_query(apart, sets)))
                row["n_sets"] = len(sets.unique())
            for metric in scores.extra:
                if metric in other.metrics:
                    row[metric], row[f"{metric}_other"] = own.mean(metric), their.mean(metric)
            rows.append(row)
    frame = pd.DataFrame(rows)
    adjusted = holm(torch.tensor(frame.p.to_numpy(), dtype=torch.float64)).tolist()
    frame.insert(list(frame).index("p") + 1, "p_holm", adjusted)
    return Comparison(frame)


def _sets(own: Scores, their: Scores, name: str) -> Int[Tensor, " example"] | None:
    """Return the sets of demonstrations that either scores share."""
    ours, theirs = own.demo_sets, their.demo_sets
    if ours is None or theirs is None:
        return theirs if ours is None else ours
    if not torch.equal(numbered(ours), numbered(theirs)):
        raise ValueError(
            f"the scores of {name!r} share their demonstrations between other episodes than those "
            "they are compared with; evaluate the same episodes, or some with fresh demonstrations"
        )
    return ours


def _sign_test(differences: Float[Tensor, " unit"]) -> float:
    """Return the p-value of the exact sign test."""
    from scipy.stats import binomtest  # takes half a second to import

    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
