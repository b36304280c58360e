"""Task decodability (TD): how well the task can be read off the representation.

All tasks' representations are pooled; each point, itself left out, is classified by the majority
vote of its k nearest neighbours (Euclidean); TD of a task is the share of its points classified
right (Han et al. 2025, section 4; N = 100 points a task, k = 10). It is computed at every layer.
TD means something only over tasks whose inputs look alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_taskvec.collect import Activations, layer_index

_AT_ONCE = 50
"""Permutations at once."""


@dataclass(frozen=True, repr=False)
class Decodability:
    """Task decodability by layer and task.

    Attributes:
        scores: ``[layer, task]``, the share of the task's points classified right.
        tasks: The tasks' names.
        layers: The layers, counted from 0.
        k: The number of neighbours that vote.
        n: ``[task]``, the number of points of each task.
        activations: What the scores were computed from, for :meth:`pairwise`.
    """

    scores: Float[Tensor, "layer task"]
    tasks: tuple[str, ...]
    layers: tuple[int, ...]
    k: int
    n: Int[Tensor, " task"]
    activations: Activations

    @property
    def mean(self) -> Float[Tensor, " layer"]:
        """The mean over tasks, by layer."""
        return self.scores.mean(dim=1)

    @property
    def best_layer(self) -> int:
        """The layer with the highest mean, the first of several."""
        return self.layers[int(self.mean.argmax())]

    @property
    def chance(self) -> float:
        """What a classifier that ignores the representation is expected to score."""
        return 1 / len(self.tasks)

    def pairwise(self, layer: int) -> Float[Tensor, "task task"]:
        """TD of each pair of tasks alone, at one layer (the paper's Figure 23).

        Returns:
            ``[task, task]``: row i, column j is the share of task i's points that are told from
            task j's; the diagonal is NaN.

        Raises:
            ValueError: If the layer was not collected, or a pair has k points or fewer.
        """
        points = self.activations.at(layer)
        labels = self.activations.labels
        matrix = torch.full((len(self.tasks), len(self.tasks)), float("nan"))
        distances = _distances(_flat(points))
        for first, second in combinations(range(len(self.tasks)), 2):
            chosen = (labels == first) | (labels == second)
            _check_k(self.k, int(chosen.sum()))
            pair = (labels[chosen] == second).long()
            hit = _hits(distances[chosen][:, chosen], pair, self.k, n_classes=2)
            matrix[first, second] = hit[pair == 0].float().mean()
            matrix[second, first] = hit[pair == 1].float().mean()
        return matrix

    def null(self, n_permutations: int = 1_000, seed: int = 0) -> DecodabilityNull:
        """The mean TD that labels without meaning would have, at every layer.

        Labels are permuted over the points, the same way at every layer; the neighbours stay, so
        that no distance is computed anew.

        Args:
            n_permutations: How often.
            seed: Seed of the permutations.

        Returns:
            The null distribution, with p-values.
        """
        generator = torch.Generator().manual_seed(seed)
        labels, n_classes = self.activations.labels, len(self.tasks)
        orders = [torch.randperm(len(labels), generator=generator) for _ in range(n_permutations)]
        permuted = labels[torch.stack(orders)].to(torch.int8)
        means = torch.empty(n_permutations, len(self.layers))
        for index in range(len(self.layers)):
            distances = _distances(_flat(self.activations.values[:, index]))
            nearest, neighbours = distances.topk(self.k, dim=1, largest=False)
            for start in range(0, n_permutations, _AT_ONCE):
                some = permuted[start : start + _AT_ONCE]
                hits = _vote(some[:, neighbours], nearest, n_classes) == some
                per_task = [_share(hits, some == task) for task in range(n_classes)]
                means[start : start + _AT_ONCE, index] = torch.stack(per_task).mean(dim=0)
        return DecodabilityNull(self.mean, means, self.layers)

    def interval(
        self, layer: int, confidence: float = 0.95, n_resamples: int = 2_000, seed: int = 0
    ) -> Float[Tensor, "task 2"]:
        """Each task's interval at a layer, by a bootstrap over its points; neighbours stay.

        Raises:
            ValueError: If the layer was not collected.
        """
        distances = _distances(_flat(self.activations.at(layer)))
        labels = self.activations.labels
        hits = _hits(distances, labels, self.k, n_classes=len(self.tasks)).float()
        generator = torch.Generator().manual_seed(seed)
        tail = (1 - confidence) / 2
        intervals = []
        for task in range(len(self.tasks)):
            own = hits[labels == task]
            drawn = torch.randint(len(own), (n_resamples, len(own)), generator=generator)
            shares = own[drawn].mean(dim=1)
            intervals.append(torch.quantile(shares, torch.tensor([tail, 1 - tail])))
        return torch.stack(intervals)

    def at(self, layer: int) -> Float[Tensor, " task"]:
        """The scores at one layer, by its number in the model."""
        return self.scores[layer_index(self.layers, layer)]

    def to_frame(self) -> pd.DataFrame:
        """One row a layer and task: ``layer, task, td, n, k``."""
        return pd.DataFrame(
            [
                {
                    "layer": layer,
                    "task": task,
                    "td": float(self.scores[row, column]),
                    "n": int(self.n[column]),
                    "k": self.k,
                }
                for row, layer in enumerate(self.layers)
                for column, task in enumerate(self.tasks)
            ]
        )

    def __repr__(self) -> str:
        best = self.best_layer
        per_task = ", ".join(
            f"{task} {score:.2f}"
            for task, score in zip(self.tasks, self.at(best).tolist(), strict=True)
        )
        return (
            f"Decodability(best layer {best}: mean {float(self.mean.max()):.3f} "
            f"(chance {self.chance:.3f}, k={self.k}); {per_task})"
        )


@dataclass(frozen=True, repr=False)
class DecodabilityNull:
    """TD beside what it would be if the labels meant nothing.

    Attributes:
        observed: Mean TD, ``[layer]``.
        permuted: Mean TD under permuted labels, ``[permutation, layer]``.
        layers: The layers, counted from 0.
    """

    observed: Float[Tensor, " layer"]
    permuted: Float[Tensor, "permutation layer"]
    layers: tuple[int, ...]

    @property
    def p_values(self) -> Float[Tensor, " layer"]:
        """At each layer by itself, the share of permutations with as high a TD, and one more."""
        as_high = (self.permuted >= self.observed).sum(dim=0)
        return (1 + as_high) / (1 + len(self.permuted))

    @property
    def p_value(self) -> float:
        """Of the highest TD over layers: each permutation's highest is what it is held against."""
        as_high = (self.permuted.max(dim=1).values >= self.observed.max()).sum()
        return float((1 + as_high) / (1 + len(self.permuted)))

    def band(self, confidence: float = 0.95) -> Float[Tensor, "2 layer"]:
        """Where TD lies at each layer if labels mean nothing."""
        tail = (1 - confidence) / 2
        return torch.quantile(self.permuted, torch.tensor([tail, 1 - tail]), dim=0)

    def __repr__(self) -> str:
        best = int(self.observed.argmax())
        high = float(self.band()[1, best])
        return (
            f"DecodabilityNull(layer {self.layers[best]}: TD {float(self.observed[best]):.3f}, "
            f"{len(self.permuted)} permutations up to {high:.3f}; p = {self.p_value:.4f} over "
            f"{len(self.layers)} layers)"
        )


def task_decodability(activations: Activations, k: int = 10) -> Decodability:
    """Leave-one-out k-nearest-neighbour accuracy of the task, by layer and task.

    A tied vote goes to the tied class whose neighbours are nearer: the one with the smaller sum
    of distances.

    Args:
        activations: ``[example, layer, d_model]`` of at least two tasks, about 100 a task.
        k: The number of neighbours.

    Returns:
        The scores, ``[layer, task]``.

    Raises:
        ValueError: If there is one task only, or ``k`` is not between 1 and the number of points
            less one.
    """
    labels = activations.labels
    if len(activations.tasks) < 2:
        raise ValueError(
            f"decodability needs two tasks or more to tell apart; got {list(activations.tasks)}"
        )
    _check_k(k, len(labels))
    scores = []
    for index in range(len(activations.layers)):
        distances = _distances(_flat(activations.values[:, index]))
        hit = _hits(distances, labels, k, n_classes=len(activations.tasks)).float()
        scores.append(_mean_by(hit, labels, len(activations.tasks)))
    return Decodability(
        torch.stack(scores),
        activations.tasks,
        activations.layers,
        k,
        torch.bincount(labels, minlength=len(activations.tasks)),
        activations,
    )


def _check_k(k: int, n_points: int) -> None:
    if not 1 <= k < n_points:
        raise ValueError(
            f"k is {k} and there are {n_points} points; k must be at least 1 and less than the "
            "number of points, since a point does not vote for itself"
        )


def _flat(points: Tensor) -> Float[Tensor, "point d"]:
    return points.flatten(start_dim=1).float()


def _distances(points: Float[Tensor, "point d"]) -> Float[Tensor, "point point"]:
    """Euclidean distances, with every point infinitely far from itself."""
    # The mean is taken off first: far from the origin |a|^2 - 2ab + |b|^2 loses the difference.
    centred = (points - points.mean(dim=0)).double()
    squares = centred.square().sum(dim=1)
    squared = squares[:, None] + squares[None] - 2 * (centred @ centred.T)
    return squared.clamp(min=0).sqrt().fill_diagonal_(float("inf"))


def _hits(
    distances: Float[Tensor, "point point"], labels: Int[Tensor, " point"], k: int, n_classes: int
) -> Bool[Tensor, " point"]:
    """Whether the vote of each point's neighbours is its own label."""
    nearest, neighbours = distances.topk(k, dim=1, largest=False)
    return _vote(labels[neighbours], nearest, n_classes) == labels


def _vote(
    voters: Int[Tensor, "*many point k"], nearest: Float[Tensor, "point k"], n_classes: int
) -> Int[Tensor, "*many point"]:
    """The class with most votes; of tied ones the one whose voters are nearer in sum."""
    # A vote weighs one, less a distance so small that it can only decide a tie.
    weights = 1 - nearest / (2 * nearest.sum(dim=1, keepdim=True).clamp(min=1e-30))
    scores = [(weights * (voters == one)).sum(dim=-1) for one in range(n_classes)]
    return torch.stack(scores, dim=-1).argmax(dim=-1)


def _share(hits: Bool[Tensor, "many point"], own: Bool[Tensor, "many point"]) -> Tensor:
    return (hits & own).sum(dim=1) / own.sum(dim=1)


def _mean_by(
    values: Float[Tensor, " point"], labels: Int[Tensor, " point"], n_classes: int
) -> Float[Tensor, " task"]:
    sums = torch.zeros(n_classes).index_add_(0, labels, values)
    return sums / torch.bincount(labels, minlength=n_classes)
