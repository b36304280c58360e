"""Is one way of answering better than others, on the same episodes?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch

from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec._utils.statistics import bootstrap_interval, holm
from transformer_lens_taskvec.scoring import Scores


@dataclass(frozen=True, repr=False)
class Comparison(Shown):
    """Differences in accuracy on the same episodes, one row per task and other condition.

    Attributes:
        differences: ``task, against, accuracy, other, difference, low, high, p, p_holm, n`` and
            ``accuracy_low``, ``accuracy_high``, ``other_low``, ``other_high``: both accuracies with
            Wilson's 95 % intervals; their difference with its 95 % interval by a bootstrap over
            episodes; the p-value of McNemar's exact test, and the same after Holm's correction over
            all rows. Metrics that both were asked for follow, each as ``NAME`` and ``NAME_other``.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> sizes = {"train": 10, "test": 10}
        >>> sets = tv.sample_splits(tv.bitwise_tasks(null=False), sizes, n_shots=4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, sets["train"]))
        >>> sweep = tv.layer_sweep(model, tv.zero_shot(sets["test"]), vectors, controls=True)
        >>> others = {kind: control.scores_at(1) for kind, control in sweep.controls.items()}
        >>> comparison = tv.compare(sweep.scores_at(1), others)
        >>> list(comparison.table())
        ['accuracy', 'random', 'other task', 'mean']
        >>> hardest = comparison.hardest()  # for each task, the condition that answers most
        >>> bool((hardest.difference > 0).all())
        True
    """

    differences: pd.DataFrame

    def to_frame(self) -> pd.DataFrame:
        """The differences."""
        return self.differences

    def table(self) -> pd.DataFrame:
        """Accuracies with their intervals: a row per task, a column per condition."""
        columns: dict[str, dict[str, str]] = {"accuracy": {}}
        for row in self.differences.to_dict("records"):
            for name, kind in (("accuracy", "accuracy"), (row["against"], "other")):
                low, high = row[f"{kind}_low"], row[f"{kind}_high"]
                cell = f"{row[kind]:.2f} [{low:.2f}, {high:.2f}]"
                columns.setdefault(name, {})[row["task"]] = cell
        return pd.DataFrame(columns).rename_axis("task")

    def hardest(self) -> pd.DataFrame:
        """For each task the row of the other condition that answered most."""
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
        n_resamples: Resamples of the bootstrap over episodes.
        seed: Seed of the bootstrap.

    Returns:
        Paired differences with intervals and corrected p-values.

    Raises:
        ValueError: If the episodes differ, or nothing is given to compare with.

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
            own_low, own_high = scores.of(task).interval()
            other_low, other_high = other.of(task).interval()
            better, worse = int((own > 0).sum()), int((own < 0).sum())
            low, high = bootstrap_interval(own, n_resamples=n_resamples, seed=seed).tolist()
            p = binomtest(better, better + worse).pvalue if better + worse else 1.0
            extra = {
                f"{name}{suffix}": of.of(task).mean(name)
                for name in scores.extra
                for suffix, of in (("", scores), ("_other", other))
                if name in other.metrics
            }
            rows.append(
                {
                    "task": task,
                    "against": name,
                    "accuracy": scores.of(task).accuracy,
                    "accuracy_low": own_low,
                    "accuracy_high": own_high,
                    "other": other.of(task).accuracy,
                    "other_low": other_low,
                    "other_high": other_high,
                    "difference": float(own.mean()),
                    "low": low,
                    "high": high,
                    "p": float(p),
                    "n": len(own),
                    **extra,
                }
            )
    frame = pd.DataFrame(rows)
    adjusted = holm(torch.tensor(frame.p.to_numpy(), dtype=torch.float64)).tolist()
    frame.insert(list(frame).index("p") + 1, "p_holm", adjusted)
    return Comparison(frame)
