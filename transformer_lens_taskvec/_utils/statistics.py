"""Intervals, corrections for many tests, and unbiased maxima, on plain tensors.

Where queries share their demonstrations, the set of demonstrations is sampled as well as the query,
and answers after the same set are right or wrong together. The variance of a mean is then taken
over sets and queries as two-way clusters (Cameron, Gelbach & Miller 2011); with each query in one
set that is the variance over sets. Its ratio to the variance of as many independent queries, the
design effect, divides their number, and Student's quantile for the number of sets replaces the
normal one (Korn & Graubard 1998).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

_ALIKE = 0.3
"""The correlation within sets that is assumed where no answer differs from the others."""


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


def share_interval(
    values: Shaped[Tensor, "*row example"],
    queries: Int[Tensor, " example"],
    sets: Int[Tensor, " example"] | None = None,
    confidence: float = 0.95,
) -> tuple[Float[Tensor, "*row"], Float[Tensor, "*row"]]:
    """Return the ends of Wilson's interval of a share of queries.

    Args:
        values: One value per episode, between 0 and 1.
        queries: The episodes' queries, as integers.
        sets: The episodes' sets of demonstrations, as integers; None if none are shared.
        confidence: The coverage.

    Example:
        >>> right, queries = torch.tensor([1.0] * 12 + [0.0] * 8), torch.arange(20)
        >>> [round(float(end), 2) for end in share_interval(right, queries)]
        [0.39, 0.78]
        >>> [round(float(end), 2) for end in share_interval(right, queries, queries // 2)]
        [0.27, 0.86]
    """
    share = means_by_query(values, queries).mean(dim=-1)
    n, df = effective_size(values, queries, sets)
    return wilson_interval(share, n, confidence, df=df)


def effective_size(
    values: Shaped[Tensor, "*row example"],
    queries: Int[Tensor, " example"],
    sets: Int[Tensor, " example"] | None = None,
) -> tuple[Float[Tensor, "*row"], int | None]:
    """Return how many independent queries tell as much of a mean, and its degrees of freedom.

    Where nearly all answers are the same, as of 20 right ones, nothing shows how much sets differ.
    The design effect is therefore a weighted mean of the one estimated, which weighs as many as
    there are answers unlike the most frequent one, and of that at a correlation of 0.3 within sets,
    which weighs 1. It is at least 1.

    Args:
        values: One value per episode: 1 or 0 for a share, 1, 0 or -1 for a difference of shares.
        queries: The episodes' queries, as integers.
        sets: The episodes' sets of demonstrations, as integers; None if none are shared.
    """
    own = means_by_query(values, queries)
    n = own.shape[-1]
    if sets is None:
        return torch.full(own.shape[:-1], n).double(), None
    mean, variance, of_sets = _clustered(values, queries, sets)
    alone = (own.abs().mean(dim=-1) - mean.square()) / n
    gained, lost = (sign * own for sign in (1, -1))
    gained, lost = (one.clamp(min=0).sum(dim=-1) for one in (gained, lost))
    rare = n - torch.stack([gained, lost, n - gained - lost]).max(dim=0).values
    shares = _sums(_weights(queries), sets)
    alike = 1 + _ALIKE * (n * shares.square().sum() - 1).clamp(min=0)
    estimated = (variance / alone).nan_to_num(1, posinf=1).clamp(1, n)
    return n * (rare + 1) / (rare * estimated + alike), of_sets.shape[-1] - 1


def _clustered(
    values: Shaped[Tensor, "*row example"],
    queries: Int[Tensor, " example"],
    sets: Int[Tensor, " example"],
) -> tuple[Float[Tensor, "*row"], Float[Tensor, "*row"], Float[Tensor, "*row set"]]:
    """Return the mean over queries, its variance, and what each set adds to its deviation."""
    mean = means_by_query(values, queries).mean(dim=-1)
    apart = _weights(queries) * (values.double().cpu() - mean[..., None])
    pairs = numbered(queries) * len(sets) + numbered(sets)
    sums = [_sums(apart, clusters) for clusters in (sets, queries, pairs)]
    of_sets, of_queries, of_pairs = (
        one.square().sum(dim=-1) * one.shape[-1] / max(one.shape[-1] - 1, 1) for one in sums
    )
    variance = (of_sets + of_queries - of_pairs).maximum(of_sets).maximum(of_queries)
    return mean, variance, sums[0]


def _weights(queries: Int[Tensor, " example"]) -> Float[Tensor, " example"]:
    """Return each episode's weight in the mean over queries."""
    at = numbered(queries)
    counts = at.bincount().double()
    return 1 / (counts[at] * len(counts))


def _sums(
    values: Float[Tensor, "*row example"], clusters: Int[Tensor, " example"]
) -> Float[Tensor, "*row cluster"]:
    at = numbered(clusters)
    return values.new_zeros(*values.shape[:-1], int(at.max()) + 1).index_add(-1, at, values)


def wilson_interval(
    share: Float[Tensor, "*cell"],
    n: Tensor | int,
    confidence: float = 0.95,
    *,
    df: int | None = None,
) -> tuple[Float[Tensor, "*cell"], Float[Tensor, "*cell"]]:
    """Return the ends of Wilson's score interval of shares (Wilson 1927).

    A share may be a mean of fractions between 0 and 1, as where a query has several episodes. Their
    variance is at most that of as many zeros and ones, so that the interval is then too wide
    rather than too narrow.

    Args:
        share: Shares of successes.
        n: The numbers of trials, or one number for all.
        confidence: The coverage.
        df: Degrees of freedom of Student's quantile; None for the normal one. With 0, as of one
            set of demonstrations, the interval is from 0 to 1.
    """
    p, square = share.double(), _quantile(confidence, df) ** 2
    centre = (p + square / (2 * n)) / (1 + square / n)
    half = (square * (p * (1 - p) / n + square / (4 * n**2))).sqrt() / (1 + square / n)
    low, high = (centre - half).nan_to_num(0), (centre + half).nan_to_num(1)
    return low.clamp(min=0).minimum(p), high.clamp(max=1).maximum(p)


def paired_interval(
    differences: Float[Tensor, " query"],
    confidence: float = 0.95,
    *,
    n: float | None = None,
    df: int | None = None,
) -> tuple[float, float]:
    """Return the ends of Tango's score interval of a difference of paired shares (Tango 1998).

    It is the interval of the differences that the score test does not reject. At 20 of 20 queries
    gained it still has a width. A query may count as a fraction, as where it has several episodes;
    as in :func:`wilson_interval`, the interval is then too wide rather than too narrow.

    Args:
        differences: Each query's difference, between -1 and 1.
        confidence: The coverage.
        n: How many independent queries they count as; by default as many as there are.
        df: As for :func:`wilson_interval`; with 0 the interval is from -1 to 1.
    """
    n, z = len(differences) if n is None else n, float(_quantile(confidence, df))
    gained, lost = (n * float((sign * differences).clamp(min=0).mean()) for sign in (1, -1))

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


def change_interval(
    values: Shaped[Tensor, "*row example"],
    queries: Int[Tensor, " example"],
    sets: Int[Tensor, " example"] | None = None,
    confidence: float = 0.95,
) -> Float[Tensor, "*row 2"]:
    """Return :func:`mean_interval` of the mean over queries of a value per episode.

    With shared demonstrations it is the interval over sets, wider where queries repeat.

    Args:
        values: One value per episode.
        queries: The episodes' queries, as integers.
        sets: The episodes' sets of demonstrations, as integers; None if none are shared.
        confidence: The coverage.
    """
    if sets is None:
        return mean_interval(means_by_query(values, queries), confidence)
    mean, variance, of_sets = _clustered(values, queries, sets)
    n = of_sets.shape[-1]
    ends = mean_interval(mean[..., None] + n * of_sets, confidence)
    over_sets = of_sets.square().sum(dim=-1) * n / max(n - 1, 1)
    wider = (variance / over_sets).nan_to_num(1, posinf=1).clamp(min=1).sqrt()
    return (mean[..., None] + (ends - mean[..., None]) * wider[..., None]).float()


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


def _quantile(confidence: float, df: int | None = None) -> Float[Tensor, ""]:
    """Return a two-sided interval's quantile, the standard normal one or Student's.

    It is NaN for 0 degrees of freedom.
    """
    upper = torch.tensor((1 + confidence) / 2, dtype=torch.float64)
    if df is None:
        found: Tensor = torch.special.ndtri(upper)
        return found
    from scipy.stats import t  # half a second to import

    return torch.tensor(float(t.ppf(float(upper), df)), dtype=torch.float64)
