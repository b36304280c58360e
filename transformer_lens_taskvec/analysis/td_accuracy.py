"""Does decodability predict accuracy? A line fitted over tasks and numbers of shots."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec._utils.statistics import bca_interval
from transformer_lens_taskvec.analysis.decodability import Decodability
from transformer_lens_taskvec.scoring import Scores
from transformer_lens_taskvec.tasks.base import NULL

Interval = tuple[float, float]


@dataclass(frozen=True, repr=False)
class AccuracyFit(Shown):
    """Accuracy against TD, one point per task and number of shots (Han et al. 2025, Figure 4).

    Attributes:
        points: ``task, shots, td, accuracy, n, n_distinct``, one row per point.
        slope: The slope of the least-squares line.
        intercept: Its intercept.
        r2: The share of the variance in accuracy that the line explains.
        spearman: Spearman's rank correlation.
        slope_interval: 95 % interval of ``slope``, by a BCa bootstrap over tasks, whose points at
            several numbers of shots are of the same queries; NaN of a single task.
        r2_interval: The same for ``r2``.
        spearman_interval: The same for ``spearman``.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model, tasks = tv.load_model("toy"), tv.bitwise_tasks()
        >>> tv.paper.run_study(model, tasks, shots=(1, 2), n=12).fit.points.columns.tolist()
        ['task', 'shots', 'td', 'accuracy', 'n', 'n_distinct']
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
        n_resamples: Resamples of the bootstrap over tasks.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: If the shots of the two or the tasks of two numbers of shots differ, or fewer
            than three points remain.

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
    if len({frozenset(found.tasks) for found in by_shots.values()}) > 1:
        raise ValueError("the tasks differ between numbers of shots; give the same at each")
    rows = []
    for shots, found in by_shots.items():
        at = found.at(found.best_layer() if layer is None else layer)
        for task, td in zip(found.tasks, at.tolist(), strict=True):
            if task not in leave_out:
                own = scored[shots].of(task)
                row = {"task": task, "shots": shots, "td": td, "accuracy": own.accuracy}
                rows.append({**row, "n": len(own), "n_distinct": own.n_distinct})
    if len(rows) < 3:
        raise ValueError(f"the fit takes three points or more; there are {len(rows)}")
    points = pd.DataFrame(rows)
    by_task = points.pivot(index="shots", columns="task", values=["td", "accuracy"])
    x, y = (by_task[name].to_numpy().T for name in ("td", "accuracy"))
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.simplefilter("ignore")  # a correlation of values that do not vary is NaN
        slope, r2, spearman = (float(value) for value in _line(x.ravel(), y.ravel()))
        intervals = _intervals(x, y, n_resamples, seed)
    intercept = float(y.mean() - slope * x.mean())
    return AccuracyFit(points, slope, intercept, r2, spearman, *intervals)


def _line(
    x: Float[np.ndarray, "*sample point"], y: Float[np.ndarray, "*sample point"]
) -> Float[np.ndarray, "number ..."]:
    """Return slope, R^2 and Spearman's correlation; NaN where nothing varies."""
    from scipy.stats import pearsonr, rankdata  # half a second to import

    r = pearsonr(x, y, axis=-1).statistic
    ranked = pearsonr(rankdata(x, axis=-1), rankdata(y, axis=-1), axis=-1).statistic
    return np.stack([r * y.std(-1) / x.std(-1), r**2, ranked])


def _intervals(
    x: Float[np.ndarray, "task shots"],
    y: Float[np.ndarray, "task shots"],
    n_resamples: int,
    seed: int,
) -> list[Interval]:
    """Return the 95 % BCa interval of each number of the line, by resampling tasks."""
    n = len(x)
    if n < 2:
        return [(float("nan"), float("nan"))] * 3

    def lines(tasks: Int[np.ndarray, "sample task"]) -> Tensor:
        xs, ys = (rearrange(of[tasks], "sample task shots -> sample (task shots)") for of in (x, y))
        return torch.from_numpy(_line(xs, ys))

    every = np.arange(n)
    [whole] = lines(every[None]).T
    others = lines(np.stack([np.delete(every, task) for task in every]))
    drawn = np.random.default_rng(seed).integers(n, size=(n_resamples, n))
    found = zip(whole, lines(drawn).unbind(), others.unbind(), strict=True)
    return [bca_interval(float(of), resampled, left_out) for of, resampled, left_out in found]
