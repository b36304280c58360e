"""Task decodability under permuted labels, and p-values from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_taskvec._utils.frames import grid_frame
from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec.analysis.classifiers import (
    Inputs,
    Readout,
    neighbours,
    readout,
    reciprocal_ranks,
    vote,
)

_VOTES_AT_ONCE = 500_000
"""Votes of permuted labels that are counted in one go."""

ROUNDING = 1e-6
"""The most by which equal means of float32 numbers, summed in another order, differ."""


@dataclass(frozen=True, repr=False)
class DecodabilityNull(Shown):
    """TD next to its distribution under permuted labels.

    Attributes:
        observed: ``[layer]``, mean TD.
        permuted: ``[permutation, layer]``, mean TD under permuted labels.
        layers: The layers, counted from 0.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> activations = tv.collect(tv.load_model("toy"), episodes)
        >>> null = tv.task_decodability(activations).null(n_permutations=99)
        >>> null.p_value, null.band().shape
        (0.01, torch.Size([2, 4]))
    """

    observed: Float[Tensor, " layer"]
    permuted: Float[Tensor, "permutation layer"]
    layers: tuple[int, ...]

    @property
    def p_values(self) -> Float[Tensor, " layer"]:
        """``[layer]``, p-values without correction for the number of layers."""
        as_high = (self.permuted >= self.observed - ROUNDING).sum(dim=0)
        return (1 + as_high) / (1 + len(self.permuted))

    @property
    def p_value(self) -> float:
        """The p-value of the highest TD over layers, against each permutation's highest."""
        highest = reduce(self.permuted, "permutation layer -> permutation", "max")
        higher = int((highest >= self.observed.max() - ROUNDING).sum())
        return (1 + higher) / (1 + len(self.permuted))

    def band(self, confidence: float = 0.95) -> Float[Tensor, "2 layer"]:
        """Return the ends of the interval of TD under permuted labels, at each layer."""
        tail = (1 - confidence) / 2
        return torch.quantile(self.permuted, torch.tensor([tail, 1 - tail]), dim=0)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per layer: ``layer, td, null, null_low, null_high`` (95 %), ``p``."""
        low, high = self.band()
        columns = {
            "td": self.observed,
            "null": reduce(self.permuted, "permutation layer -> layer", "mean"),
            "null_low": low,
            "null_high": high,
            "p": self.p_values,
        }
        return grid_frame({"layer": self.layers}, columns)

    def __repr__(self) -> str:
        best = int(self.observed.argmax())
        high = float(self.band()[1, best])
        return (
            f"DecodabilityNull(layer {self.layers[best]}: TD {float(self.observed[best]):.3f}, "
            f"{len(self.permuted)} permutations up to {high:.3f}; p = {self.p_value:.4f} over "
            f"{len(self.layers)} layers)"
        )


def permuted_labels(
    labels: Int[Tensor, " point"], inputs: Inputs, n_permutations: int, seed: int
) -> Int[Tensor, "permutation point"]:
    """Return the labels in other orders; if inputs are given, among the points of each input."""
    generator = torch.Generator().manual_seed(seed)
    labels = labels.to(torch.int8 if int(labels.max()) < 127 else torch.int64)
    groups = torch.zeros_like(labels) if inputs is None else inputs
    to, found = groups.argsort(stable=True), labels.repeat(n_permutations, 1)
    for one in found:
        order = torch.randperm(len(labels), generator=generator)
        one[to] = labels[order[groups[order].argsort(stable=True)]]
    return found


def under_permuted(
    points: Float[Tensor, "point d"],
    permuted: Int[Tensor, "permutation point"],
    method: str | Readout,
    k: int,
    inputs: Inputs,
) -> Float[Tensor, " permutation"]:
    """Return the mean TD over tasks under each permutation of the labels.

    Args:
        points: The points at one layer.
        permuted: The permuted labels.
        method: As for :func:`task_decodability`.
        k: The number of neighbours.
        inputs: The points' inputs, for methods that compare tasks on the same ones.
    """
    permuted = permuted.to(points.device)
    n_tasks = int(permuted.max()) + 1
    of_labels = _of_labels(points, method, k, inputs, n_tasks)
    found = []
    for some in permuted.split(max(1, _VOTES_AT_ONCE // (len(points) * k))):
        hits = of_labels(some)
        own = [some == task for task in range(n_tasks)]
        shares = [(hits * of).sum(dim=1) / of.sum(dim=1) for of in own]
        found.append(torch.stack(shares).mean(dim=0))
    return torch.cat(found)


def _of_labels(
    points: Tensor, method: str | Readout, k: int, inputs: Inputs, n_tasks: int
) -> Callable[[Tensor], Tensor]:
    """Return a function from permuted labels to the points' scores, ``[permutation, point]``."""
    if method == "knn":
        nearest, others = neighbours(points, k)
        return lambda some: (vote(some[:, others], nearest, n_tasks) == some).float()
    if inputs is None:
        own = readout(method, k)
        return lambda some: torch.stack([own(points, one.long()).float() for one in some])
    there = inputs.to(points.device)
    _, order = neighbours(points, len(points) - 1)

    def of_ranks(some: Tensor) -> Tensor:
        scores = torch.stack([reciprocal_ranks(order, one, there) for one in some]).float()
        return (scores == 1).float() if method == "recall" else scores

    return of_ranks
