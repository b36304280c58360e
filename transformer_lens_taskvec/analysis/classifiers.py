"""Leave-one-out classifiers that decode the task from representations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor

Groups = Int[Tensor, " point"] | None
"""Equal for points that do not vote for each other, besides themselves; None if all others vote."""

Inputs = Int[Tensor, " point"] | None
"""Equal for points whose queries have the same input; None where that does not matter."""

Readout = Callable[[Float[Tensor, "point d"], Int[Tensor, " point"]], Tensor]
"""Scores every point: 1 where its task is decoded correctly from the other points, else 0."""


def readout(
    method: str | Readout,
    k: int,
    groups: Groups = None,
    inputs: Int[Tensor, " point"] | None = None,
) -> Readout:
    """Return the method with a name, or the function that was given.

    Only methods of :data:`WITH_NEIGHBOURS` can leave out groups, and only those of
    :data:`BY_INPUT` need to know the points' inputs.
    """
    if callable(method):
        return method
    if method not in _METHODS:
        raise ValueError(f"method is {method!r}; it must be a function or one of {list(_METHODS)}")
    return _METHODS[method](k, groups, inputs)


def readout_name(method: str | Readout) -> str:
    """Return the name of a method or of a function."""
    return method if isinstance(method, str) else getattr(method, "__name__", repr(method))


def _knn(k: int, groups: Groups = None, *_: Any) -> Readout:
    def hits(points: Tensor, labels: Tensor) -> Tensor:
        nearest, others = neighbours(points, k, groups)
        return vote(labels[others], nearest, int(labels.max()) + 1) == labels

    return hits


def _cosine(k: int, groups: Groups = None, *_: Any) -> Readout:
    def hits(points: Tensor, labels: Tensor) -> Tensor:
        # In float64, since the squares of small numbers are zero in float32.
        directions = torch.nn.functional.normalize(points.double(), dim=1, eps=1e-300)
        return _knn(k, groups)(directions, labels)

    return hits


def _centroid(*_: Any) -> Readout:
    def hits(points: Tensor, labels: Tensor) -> Tensor:
        points = points.double()
        own = torch.nn.functional.one_hot(labels).to(points.dtype)
        counts = reduce(own, "point task -> task", "sum")
        totals = einsum(own, points, "point task, point d -> task d")
        means = totals / rearrange(counts, "task -> task 1")
        # Far from the origin |a|^2 - 2ab + |b|^2, the default, loses the difference.
        distances = torch.cdist(points, means, compute_mode="donot_use_mm_for_euclid_dist")
        # Without the point its own mean is n / (n - 1) times as far from it; alone, it has no mean.
        without = (counts / (counts - 1))[labels]
        rows = torch.arange(len(labels))
        distances[rows, labels] = (distances[rows, labels] * without).nan_to_num(torch.inf)
        # Equal distances, as of equal points, are ordered by chance and not by task.
        chance = torch.rand(distances.shape, generator=torch.Generator().manual_seed(0))
        noise = 1e-12 * points.norm(dim=1, keepdim=True) + 1e-300
        nearest: Tensor = (distances + noise * chance.to(points.device)).argmin(dim=1)
        return nearest == labels

    return hits


def _linear(*_: Any) -> Readout:
    try:
        from sklearn.linear_model import RidgeClassifierCV
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError(
            "the linear probe needs scikit-learn: pip install 'transformer-lens-taskvec[probe]'"
        ) from error

    def hits(points: Tensor, labels: Tensor) -> Tensor:
        probe = make_pipeline(StandardScaler(), RidgeClassifierCV([1.0, 10.0, 100.0, 1e3, 1e4]))
        n_folds = max(2, min(5, int(labels.bincount().max())))
        folds = StratifiedKFold(n_folds, shuffle=True, random_state=0)
        predicted = cross_val_predict(probe, points.numpy(), labels.numpy(), cv=folds)
        return torch.as_tensor(predicted) == labels

    return hits


def _divergence(k: int, groups: Groups = None, *_: Any) -> Readout:
    def scores(points: Tensor, labels: Tensor) -> Tensor:
        _, others = neighbours(points, k, groups)
        n_classes = int(labels.max()) + 1
        # A vote counts less in a larger class, as if all were of the same size.
        weights = len(labels) / (n_classes * labels.bincount())[labels[others]]
        same = labels[others] == rearrange(labels, "point -> point 1")
        votes, whole = (reduce(of, "point k -> point", "sum") for of in (weights * same, weights))
        # One more vote, shared by all classes, keeps the logarithm finite.
        share = (votes + 1 / n_classes) / (whole + 1)
        return (share * n_classes).log() / math.log(n_classes)

    return scores


def _retrieval(_k: int, _groups: Groups, inputs: Int[Tensor, " point"]) -> Readout:
    def scores(points: Tensor, labels: Tensor) -> Tensor:
        _, others = neighbours(points, len(points) - 1)
        return reciprocal_ranks(others, labels, inputs.to(labels.device))

    return scores


def _recall(*given: Any) -> Readout:
    def hits(points: Tensor, labels: Tensor) -> Tensor:
        return _retrieval(*given)(points, labels) == 1

    return hits


def reciprocal_ranks(
    others: Int[Tensor, "point other"], labels: Int[Tensor, " point"], inputs: Int[Tensor, " point"]
) -> Float[Tensor, " point"]:
    """Return one over the rank of the first point of the same task; 0 where there is none.

    Points of the same task and the same input are left out.

    Args:
        others: All other points in the order of their distance, the nearest first.
        labels: The points' tasks.
        inputs: The points' inputs.
    """
    same = labels[others] == rearrange(labels, "point -> point 1")
    candidates = ~(same & (inputs[others] == rearrange(inputs, "point -> point 1")))
    found = same & candidates
    ranks = candidates.cumsum(dim=1).gather(1, found.int().argmax(dim=1, keepdim=True))
    return torch.where(found.any(dim=1), 1 / rearrange(ranks.double(), "point 1 -> point"), 0.0)


_METHODS: Mapping[str, Callable[..., Readout]] = {
    "knn": _knn,
    "cosine": _cosine,
    "centroid": _centroid,
    "linear": _linear,
    "divergence": _divergence,
    "retrieval": _retrieval,
    "recall": _recall,
}
WITH_NEIGHBOURS = ("knn", "cosine", "divergence")
BY_INPUT = ("retrieval", "recall")


_DISTANCES_AT_ONCE = 2**22
"""Distances held at one time, 32 MB of them."""


def neighbours(
    points: Float[Tensor, "point d"], k: int, groups: Groups = None
) -> tuple[Float[Tensor, "point k"], Int[Tensor, "point k"]]:
    """Return each point's k nearest other points, the nearest first: distances and indices.

    Distances are Euclidean and computed for some points at a time, on the points' device. Points at
    the same distance, such as equal points, would be ordered by their place in the list, that is by
    task; random noise of a ten-millionth of the point's distance from a median orders them
    instead, the same on any device. Points of one group are not each other's neighbours.
    """
    # The median is subtracted first: far from the origin |a|^2 - 2ab + |b|^2 loses the difference.
    # The mean would follow a single outlier, and so would noise on the scale of all points. The
    # median of some points is near enough, and that of all would take as long as a third of this.
    some = points[:: max(1, len(points) // 64)]
    centred = points.double() - some.median(dim=0).values.double()
    squares = reduce(centred.square(), "point d -> point", "sum")
    noise = rearrange(1e-7 * squares.sqrt() + 1e-30, "point -> point 1")
    generator = torch.Generator().manual_seed(0)
    at_once = min(len(points), max(1, _DISTANCES_AT_ONCE // len(points)))
    # Tensors that are made anew for each part would fragment the memory.
    chance = torch.empty(at_once, len(points))
    products, apart = (centred.new_empty(chance.shape) for _ in range(2))
    found = []
    for start, rows in zip(range(0, len(points), at_once), centred.split(at_once), strict=True):
        chance, products, apart = (buffer[: len(rows)] for buffer in (chance, products, apart))
        torch.mm(rows, centred.T, out=products)
        torch.add(rearrange(squares[start : start + at_once], "row -> row 1"), squares, out=apart)
        apart.sub_(products, alpha=2).clamp_(min=0).sqrt_()
        products.copy_(torch.rand(chance.shape, generator=generator, out=chance))
        products.mul_(noise[start : start + at_once])
        apart.add_(products).diagonal(start).fill_(torch.inf)  # not its own neighbour
        if groups is not None:
            own = rearrange(groups[start : start + at_once], "row -> row 1")
            apart.masked_fill_((own == groups).to(apart.device), torch.inf)
        found.append(apart.topk(k, dim=1, largest=False))
    return torch.cat([one.values for one in found]), torch.cat([one.indices for one in found])


def vote(
    voters: Int[Tensor, "*many point k"], nearest: Float[Tensor, "point k"], n_classes: int
) -> Int[Tensor, "*many point"]:
    """Return the class with most votes; of tied classes, that with the nearest voters in sum."""
    # Each vote weighs one minus a distance so small that it can only break a tie.
    weights = 1 - nearest / (2 * nearest.sum(dim=1, keepdim=True).clamp(min=1e-30))
    scores = [(weights * (voters == one)).sum(dim=-1) for one in range(n_classes)]
    return torch.stack(scores, dim=-1).argmax(dim=-1)
