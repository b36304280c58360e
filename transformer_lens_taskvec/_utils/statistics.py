"""Intervals, corrections for many tests, and unbiased maxima, on plain tensors."""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor


def bootstrap_interval(
    values: Float[Tensor, "*row point"],
    confidence: float = 0.95,
    n_resamples: int = 2_000,
    seed: int = 0,
) -> Float[Tensor, "*row 2"]:
    """Return the percentile interval of the mean over points; all rows share the resamples.

    Args:
        values: The values, averaged over the last axis.
        confidence: The coverage.
        n_resamples: The number of resamples.
        seed: Seed of the resampling.
    """
    n = values.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n, (n_resamples, n), generator=generator)
    counts = torch.zeros(n_resamples, n).scatter_add_(1, drawn, torch.ones(drawn.shape))
    means = einsum(values.float(), counts, "... point, resample point -> ... resample") / n
    tail = (1 - confidence) / 2
    ends = torch.quantile(means, torch.tensor([tail, 1 - tail]), dim=-1)
    return rearrange(ends, "end ... -> ... end")


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
    places: dict[int, int] = {}
    at = torch.tensor(
        [places.setdefault(one, len(places)) for one in queries.tolist()], dtype=torch.long
    )
    totals = torch.zeros(*values.shape[:-1], len(places), dtype=torch.float64)
    return totals.index_add(-1, at, values.double().cpu()) / at.bincount()


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
    return (centre - half).clamp(min=0), (centre + half).clamp(max=1)


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
    values: Float[Tensor, "layer point"], labels: Int[Tensor, " point"]
) -> Float[Tensor, ""]:
    """Return the best layer's mean over tasks, on points that did not choose the layer.

    Every other point of each task chooses the layer, and the rest are averaged there; then the
    halves swap roles. Unlike the highest of many layers' means, this is not biased upwards.

    Args:
        values: The score of each point at each layer.
        labels: The points' tasks.

    Returns:
        The mean of the two halves; NaN if a task has only one point.
    """
    turn = torch.zeros_like(labels)
    tasks = labels.unique()
    for task in tasks:
        own = labels == task
        turn[own] = torch.arange(int(own.sum())) % 2
    by_half = torch.stack(
        [
            torch.stack(
                [values[:, (labels == task) & (turn == half)].mean(dim=1) for task in tasks]
            )
            for half in (0, 1)
        ]
    ).mean(dim=1)  # [half, layer]
    best = by_half.argmax(dim=1)
    return (by_half[1, best[0]] + by_half[0, best[1]]) / 2


def _quantile(confidence: float) -> Float[Tensor, ""]:
    """Return the standard normal quantile of a two-sided interval."""
    upper = torch.tensor((1 + confidence) / 2, dtype=torch.float64)
    found: Tensor = torch.special.ndtri(upper)
    return found
