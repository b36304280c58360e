"""Intervals, corrections and honest maxima, on plain tensors."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def bootstrap_interval(
    values: Float[Tensor, "*row point"],
    confidence: float = 0.95,
    n_resamples: int = 2_000,
    seed: int = 0,
) -> Float[Tensor, "*row 2"]:
    """Percentile interval of the mean over points, the same resamples for every row.

    Args:
        values: What to average over the last axis.
        confidence: The share of resamples inside.
        n_resamples: Resamples, of points.
        seed: Seed of the resamples.
    """
    n = values.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n, (n_resamples, n), generator=generator)
    counts = torch.zeros(n_resamples, n).scatter_add_(1, drawn, torch.ones(drawn.shape))
    means = (values.reshape(-1, n).float() @ counts.T) / n
    tail = (1 - confidence) / 2
    ends = torch.quantile(means, torch.tensor([tail, 1 - tail]), dim=-1)
    return ends.T.reshape(*values.shape[:-1], 2)


def wilson_interval(
    share: Float[Tensor, "*cell"], n: Tensor | int, confidence: float = 0.95
) -> tuple[Float[Tensor, "*cell"], Float[Tensor, "*cell"]]:
    """Wilson's interval of shares of ``n`` (Wilson 1927), by scipy.

    Args:
        share: Shares of successes.
        n: Of how many, one number or one that broadcasts to the shares.
        confidence: Of the interval.
    """
    from scipy.stats import binomtest  # half a second, that most imports do without

    counts = torch.as_tensor(n).expand(share.shape)
    successes = (share.double() * counts).round().long()
    found = [
        binomtest(s, m).proportion_ci(confidence_level=confidence, method="wilson")
        for s, m in zip(successes.flatten().tolist(), counts.flatten().tolist(), strict=True)
    ]
    low, high = torch.tensor([[one.low, one.high] for one in found], dtype=torch.float64).T
    return low.view(share.shape), high.view(share.shape)


def holm(p_values: Float[Tensor, " test"]) -> Float[Tensor, " test"]:
    """P-values that hold for all tests together (Holm 1979).

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
    """The best layer's mean over tasks, on points that the layer was not chosen on.

    Every other point of each task chooses the layer, the rest are averaged there; then the other
    way round. The highest of many layers' means is too high; this is not.

    Args:
        values: A score of every point at every layer.
        labels: The points' tasks.

    Returns:
        The mean of the two halves; NaN where a task has one point only.
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
