"""Intervals, corrections for many tests, and unbiased maxima, on plain tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor


def means_by_query(
    values: Shaped[Tensor, "*row example"], queries: Int[Tensor, " example"]
) -> Float[Tensor, "*row query"]:
    """Return the mean of each distinct query, in float64, in order of first appearance.

    Every average, interval and test of the library goes through this: episodes of one query are
    not independent of each other.

    Args:
        values: One value per episode.
        queries: The episodes' queries, as integers.

    Example:
        >>> means_by_query(torch.tensor([1, 0, 0, 1]), torch.tensor([7, 7, 3, 7])).round(decimals=2)
        tensor([0.6700, 0.0000], dtype=torch.float64)
    """
    at = numbered(queries)
    totals = torch.zeros(*values.shape[:-1], at.unique().numel(), dtype=torch.float64)
    return totals.index_add(-1, at, values.double().cpu()) / at.bincount()


def numbered(queries: Int[Tensor, " example"]) -> Int[Tensor, " example"]:
    """Return the number of each query, by first appearance.

    Example:
        >>> numbered(torch.tensor([7, 7, 3, 7]))
        tensor([0, 0, 1, 0])
    """
    places: dict[int, int] = {}
    numbers = [places.setdefault(one, len(places)) for one in queries.tolist()]
    return torch.tensor(numbers, dtype=torch.long)


def wilson_interval(
    share: Float[Tensor, "*cell"], n: Tensor | int, confidence: float = 0.95
) -> tuple[Float[Tensor, "*cell"], Float[Tensor, "*cell"]]:
    """Return the ends of Wilson's score interval of shares (Wilson 1927).

    A share may be a mean of fractions between 0 and 1, as where a query has several episodes. Their
    variance is at most that of as many zeros and ones, so that the interval is then too wide
    rather than too narrow.

    Args:
        share: Shares of successes.
        n: The numbers of trials, or one number for all.
        confidence: The coverage.
    """
    p, square = share.double(), _quantile(confidence) ** 2
    centre = (p + square / (2 * n)) / (1 + square / n)
    half = (square * (p * (1 - p) / n + square / (4 * n**2))).sqrt() / (1 + square / n)
    return (centre - half).clamp(min=0).minimum(p), (centre + half).clamp(max=1).maximum(p)


def paired_interval(
    differences: Float[Tensor, " query"], confidence: float = 0.95
) -> tuple[float, float]:
    """Return the ends of Tango's score interval of a difference of paired shares (Tango 1998).

    It is the interval of the differences that the score test does not reject. At 20 of 20 queries
    gained it still has a width. A query may count as a fraction, as where it has several episodes;
    as in :func:`wilson_interval`, the interval is then too wide rather than too narrow.

    Args:
        differences: Each query's difference, between -1 and 1.
        confidence: The coverage.
    """
    n, z = len(differences), float(_quantile(confidence))
    gained, lost = (float((sign * differences).clamp(min=0).sum()) for sign in (1, -1))

    def score(delta: float) -> float:
        linear = (2 * n - gained + lost) * delta - gained - lost
        root = math.sqrt(max(linear**2 + 8 * n * lost * delta * (1 - delta), 0))
        variance = n * ((root - linear) / (2 * n) + delta * (1 - delta))
        return (gained - lost - n * delta) / math.sqrt(max(variance, 1e-300))

    def bound(outside: float, sign: int) -> float:
        inside = (gained - lost) / n
        for _ in range(60):
            middle = (outside + inside) / 2
            if sign * score(middle) > z:
                outside = middle
            else:
                inside = middle
        return inside

    return bound(-1, 1), bound(1, -1)


def mean_interval(
    values: Float[Tensor, "*row query"], confidence: float = 0.95
) -> Float[Tensor, "*row 2"]:
    """Return Student's interval of the mean over queries, corrected for skewness (Hall 1992).

    Losses are skewed, and of 10 of them the percentile bootstrap covers the mean 80 to 90 times in
    a hundred at a nominal 95. Hall's cubic transformation of the statistic needs no resampling and
    covers it about as often as a studentised bootstrap. Values that do not vary give an interval
    without width, and a single value gives NaN.

    Args:
        values: The values, averaged over the last axis.
        confidence: The coverage.
    """
    from scipy.stats import t  # half a second to import

    n = values.shape[-1]
    if n < 2:
        return torch.full((*values.shape[:-1], 2), torch.nan)
    values = values.double()
    mean = values.mean(dim=-1, keepdim=True)
    apart = values - mean
    skewness = apart.pow(3).mean(-1, True) / apart.square().mean(-1, True).pow(1.5)
    skewness = skewness.nan_to_num(0) * math.sqrt(n * (n - 1)) / max(n - 2, 1)
    skewness = torch.where(skewness.abs() < 1e-6, 1e-6, skewness)
    ends = torch.tensor([1.0, -1.0]) * float(t.ppf((1 + confidence) / 2, n - 1)) / math.sqrt(n)
    cube = 1 + skewness * (ends - skewness / (6 * n))
    studentised = 3 * (cube.sign() * cube.abs().pow(1 / 3) - 1) / skewness
    return (mean - values.std(dim=-1, keepdim=True) * studentised).float()


def bca_interval(
    estimate: float,
    resampled: Float[Tensor, " resample"],
    left_out: Float[Tensor, " unit"],
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Return the bias-corrected and accelerated bootstrap interval (Efron 1987).

    Args:
        estimate: The statistic of the sample.
        resampled: The statistic of each resample; those that are NaN are left out.
        left_out: The statistic with each unit of the sample left out.
        confidence: The coverage.

    Returns:
        Its ends; NaN if the statistic is NaN of every resample.
    """
    known = resampled[resampled.isfinite()].double()
    if not len(known):
        return math.nan, math.nan
    equal = known.isclose(known.new_tensor(estimate))  # up to rounding, in another order
    below = (~equal & (known < estimate)).sum() + equal.sum() / 2
    bias = torch.special.ndtri(below.double().clamp(0.5, len(known) - 0.5) / len(known))
    apart = left_out[left_out.isfinite()].double()
    apart = apart.mean() - apart
    acceleration = (apart.pow(3).sum() / (6 * apart.square().sum().pow(1.5))).nan_to_num(0)
    shifted = bias + _quantile(confidence) * torch.tensor([-1.0, 1.0]).double()
    share = torch.special.ndtr(bias + shifted / (1 - acceleration * shifted))
    low, high = torch.quantile(known, share).tolist()
    return low, high


def holm(p_values: Float[Tensor, " test"]) -> Float[Tensor, " test"]:
    """Return p-values corrected for the number of tests (Holm 1979).

    Example:
        >>> holm(torch.tensor([0.01, 0.04, 0.03]))
        tensor([0.0300, 0.0600, 0.0600])
    """
    order = p_values.argsort()
    left = torch.arange(len(p_values), 0, -1)
    adjusted = torch.empty_like(p_values)
    adjusted[order] = (p_values[order] * left).cummax(dim=0).values.clamp(max=1)
    return adjusted


def cross_fitted_best(
    by_task: Sequence[Float[Tensor, "layer query"]],
    choosing: Float[Tensor, "2 layer"] | None = None,
) -> Float[Tensor, ""]:
    """Return the best layer's mean over tasks, on queries that did not choose the layer.

    Every other query of each task chooses the layer, and the rest are averaged there; then the
    halves swap roles. Unlike the highest of many layers' means, this is not biased upwards.

    Args:
        by_task: For each task the score of each query at each layer.
        choosing: The score of each layer on each half alone, the even queries' and the odd ones',
            where the score of one query depends on others; by default the mean.

    Returns:
        The mean of the two halves; NaN if a task has only one query.
    """
    by_half = torch.stack(
        [
            torch.stack([own[:, half::2].mean(dim=1) for own in by_task]).mean(dim=0)
            for half in (0, 1)
        ]
    )
    best = (by_half if choosing is None else choosing).argmax(dim=1)
    return (by_half[1, best[0]] + by_half[0, best[1]]) / 2


def _quantile(confidence: float) -> Float[Tensor, ""]:
    """Return the standard normal quantile of a two-sided interval."""
    upper = torch.tensor((1 + confidence) / 2, dtype=torch.float64)
    found: Tensor = torch.special.ndtri(upper)
    return found
