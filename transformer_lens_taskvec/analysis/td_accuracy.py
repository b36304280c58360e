"""Does decodability predict accuracy? A line through points of task and number of shots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec.analysis.decodability import Decodability
from transformer_lens_taskvec.scoring import Scores
from transformer_lens_taskvec.tasks.base import NULL

Interval = tuple[float, float]


@dataclass(frozen=True, repr=False)
class AccuracyFit(Shown):
    """Accuracy against TD, a point a task and number of shots (Han et al. 2025, Figure 4).

    Attributes:
        points: ``task, shots, td, accuracy``, a row a point.
        slope: Of the least-squares line.
        intercept: Of the same line.
        r2: The share of the accuracies' variance that the line explains.
        spearman: Rank correlation.
        slope_interval: 95 % interval of the slope, by a bootstrap over points.
        r2_interval: The same of ``r2``.
        spearman_interval: The same of ``spearman``.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> study = tv.paper.run_study(model, tv.bitwise_tasks(), shots=(1, 2), n=12)
        >>> study.fit.points.columns.tolist()
        ['task', 'shots', 'td', 'accuracy']
        >>> low, high = study.fit.r2_interval
        >>> low <= study.fit.r2 <= high
        True
    """

    points: pd.DataFrame
    slope: float
    intercept: float
    r2: float
    spearman: float
    slope_interval: Interval
    r2_interval: Interval
    spearman_interval: Interval

    def to_frame(self) -> pd.DataFrame:
        """The points."""
        return self.points

    def __repr__(self) -> str:
        def spelled(name: str, value: float, interval: Interval) -> str:
            return f"{name} {value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"

        return (
            f"AccuracyFit({len(self.points)} points: {spelled('R^2', self.r2, self.r2_interval)}, "
            f"{spelled('slope', self.slope, self.slope_interval)}, "
            f"{spelled('Spearman', self.spearman, self.spearman_interval)})"
        )


def td_vs_accuracy(
    decodability: Decodability | Mapping[int, Decodability],
    scores: Scores | Mapping[int, Scores],
    *,
    layer: int | None = None,
    leave_out: tuple[str, ...] = (NULL,),
    n_resamples: int = 2_000,
    seed: int = 0,
) -> AccuracyFit:
    """Fit accuracy to TD over tasks and numbers of shots (Han et al. 2025, section 4).

    Args:
        decodability: TD; or, by number of shots, several.
        scores: Scores of the same tasks; by the same numbers of shots.
        layer: The layer of TD; by default each one's best.
        leave_out: Tasks whose accuracy means nothing.
        n_resamples: Bootstrap samples, of points.
        seed: Seed of the bootstrap.

    Returns:
        The points, the line, and how well it fits, with 95 % intervals.

    Raises:
        ValueError: If the shots or tasks of the two differ, or fewer than three points are left.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> td, scores = {}, {}
        >>> for shots in (1, 2):
        ...     episodes = tv.sample_episodes(tv.bitwise_tasks(), 12, shots, seed=shots)
        ...     td[shots] = tv.task_decodability(tv.collect(model, episodes))
        ...     scores[shots] = tv.evaluate(model, episodes)
        >>> len(tv.td_vs_accuracy(td, scores).points)  # six tasks at two numbers of shots
        12
    """
    by_shots = decodability if isinstance(decodability, Mapping) else {0: decodability}
    scored = scores if isinstance(scores, Mapping) else {0: scores}
    if set(by_shots) != set(scored):
        raise ValueError(f"shots differ: {sorted(by_shots)} for TD, {sorted(scored)} for scores")
    rows = []
    for shots, found in by_shots.items():
        at = found.at(found.best_layer() if layer is None else layer)
        for task, td in zip(found.tasks, at.tolist(), strict=True):
            if task not in leave_out:
                accuracy = scored[shots].of(task).accuracy
                rows.append({"task": task, "shots": shots, "td": td, "accuracy": accuracy})
    if len(rows) < 3:
        raise ValueError(f"a line needs three points or more; there are {len(rows)}")
    points = pd.DataFrame(rows)
    measured = _measure(points[["td"]].to_numpy().T, points[["accuracy"]].to_numpy().T)
    drawn = np.random.default_rng(seed).integers(len(points), size=(n_resamples, len(points)))
    resampled = _measure(points.td.to_numpy()[drawn], points.accuracy.to_numpy()[drawn])
    slope, r2, spearman = (float(values[0]) for values in measured)
    intervals = [_interval(values) for values in resampled]
    intercept = float(points.accuracy.mean() - slope * points.td.mean())
    return AccuracyFit(points, slope, intercept, r2, spearman, *intervals)


def _measure(
    x: Float[np.ndarray, "sample point"], y: Float[np.ndarray, "sample point"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slope, R^2 and Spearman's correlation of each sample; NaN where nothing varies."""
    from scipy.stats import rankdata

    def moments(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        a, b = (values - values.mean(axis=1, keepdims=True) for values in (a, b))
        return (a * b).sum(axis=1), (a * a).sum(axis=1), (b * b).sum(axis=1)

    with np.errstate(divide="ignore", invalid="ignore"):
        xy, xx, yy = moments(x, y)
        ranks = moments(rankdata(x, axis=1), rankdata(y, axis=1))
        return xy / xx, xy**2 / (xx * yy), ranks[0] / np.sqrt(ranks[1] * ranks[2])


def _interval(values: np.ndarray) -> Interval:
    known = values[np.isfinite(values)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)
