"""Does decodability predict accuracy? A line fitted over tasks and numbers of shots."""

from __future__ import annotations

import warnings
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
    """Accuracy against TD, one point per task and number of shots (Han et al. 2025, Figure 4).

    Attributes:
        points: ``task, shots, td, accuracy``, one row per point.
        slope: The slope of the least-squares line.
        intercept: Its intercept.
        r2: The share of the variance in accuracy that the line explains.
        spearman: Spearman's rank correlation.
        slope_interval: 95 % interval of ``slope``, by a bootstrap over points.
        r2_interval: The same for ``r2``.
        spearman_interval: The same for ``spearman``.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model, tasks = tv.load_model("toy"), tv.bitwise_tasks()
        >>> tv.paper.run_study(model, tasks, shots=(1, 2), n=12).fit.points.columns.tolist()
        ['task', 'shots', 'td', 'accuracy']
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
        """Return the points."""
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
    """Return the fit of accuracy to TD over tasks and shots (Han et al. 2025, section 4).

    Args:
        decodability: TD, or a mapping from number of shots to TD.
        scores: Scores of the same tasks, or a mapping with the same numbers of shots.
        layer: The layer of TD; by default the best layer of each.
        leave_out: Tasks whose accuracy is meaningless.
        n_resamples: Resamples of the bootstrap over points.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: If the shots or tasks of the two differ, or fewer than three points remain.

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
        raise ValueError(f"the fit takes three points or more; there are {len(rows)}")
    points = pd.DataFrame(rows)
    x, y = points.td.to_numpy(), points.accuracy.to_numpy()
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.simplefilter("ignore")  # a correlation of values that do not vary is NaN
        slope, r2, spearman = (float(value) for value in _line(x, y))
        intervals = _intervals(x, y, n_resamples, seed)
    intercept = float(y.mean() - slope * x.mean())
    return AccuracyFit(points, slope, intercept, r2, spearman, *intervals)


def _line(
    x: Float[np.ndarray, "*sample point"], y: Float[np.ndarray, "*sample point"], axis: int = -1
) -> Float[np.ndarray, "number ..."]:
    """Return slope, R^2 and Spearman's correlation; NaN where nothing varies."""
    from scipy.stats import pearsonr, rankdata  # half a second to import

    r = pearsonr(x, y, axis=axis).statistic
    ranked = pearsonr(rankdata(x, axis=axis), rankdata(y, axis=axis), axis=axis).statistic
    return np.stack([r * y.std(axis) / x.std(axis), r**2, ranked])


def _intervals(
    x: Float[np.ndarray, " point"], y: Float[np.ndarray, " point"], n_resamples: int, seed: int
) -> list[Interval]:
    """Return the 95 % percentile interval of each number of the line, by resampling points."""
    from scipy.stats import bootstrap

    drawn = bootstrap(
        (x, y),
        _line,
        paired=True,
        vectorized=True,
        n_resamples=n_resamples,
        method="percentile",
        random_state=seed,
    ).bootstrap_distribution
    return [(float(low), float(high)) for low, high in np.nanpercentile(drawn, [2.5, 97.5], 1).T]
