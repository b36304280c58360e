"""Ways to read the task off representations: what counts as decodable.

Each scores every point, 1 where its task is read off rightly and 0 where not, the point itself
left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

Method = Callable[[Float[Tensor, "point d"], Int[Tensor, " point"]], Tensor]
"""Scores every point: 1 where its task is read off rightly, 0 where not."""


def readout(method: str | Method, k: int) -> Method:
    """The function of a method's name; a function as it is."""
    if callable(method):
        return method
    if method not in _METHODS:
        raise ValueError(f"method is {method!r}; it must be a function or one of {list(_METHODS)}")
    return _METHODS[method](k)


def readout_name(method: str | Method) -> str:
    """The name of a method, or of a function."""
    return method if isinstance(method, str) else getattr(method, "__name__", repr(method))


def _knn(k: int) -> Method:
    def hits(points: Tensor, labels: Tensor) -> Tensor:
        nearest, neighbours = distances(points).topk(k, dim=1, largest=False)
        return vote(labels[neighbours], nearest, int(labels.max()) + 1) == labels

    return hits


def _cosine(k: int) -> Method:
    def hits(points: Tensor, labels: Tensor) -> Tensor:
        return _knn(k)(torch.nn.functional.normalize(points, dim=1), labels)

    return hits


def _centroid(_: int) -> Method:
    def hits(points: Tensor, labels: Tensor) -> Tensor:
        own = torch.nn.functional.one_hot(labels).to(points.dtype)
        counts = own.sum(dim=0)
        means = (own.T @ points) / counts[:, None]
        distances = torch.cdist(points, means)
        # Without the point its own mean is n / (n - 1) times as far from it; alone, nowhere.
        without = (counts / (counts - 1))[labels]
        to_own = (distances.gather(1, labels[:, None])[:, 0] * without).nan_to_num(torch.inf)
        distances.scatter_(1, labels[:, None], to_own[:, None])
        return distances.argmin(dim=1) == labels

    return hits


def _linear(_: int) -> Method:
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
        folds = StratifiedKFold(5, shuffle=True, random_state=0)
        predicted = cross_val_predict(probe, points.numpy(), labels.numpy(), cv=folds)
        return torch.as_tensor(predicted) == labels

    return hits


def _divergence(k: int) -> Method:
    def scores(points: Tensor, labels: Tensor) -> Tensor:
        _, neighbours = distances(points).topk(k, dim=1, largest=False)
        n_classes = int(labels.max()) + 1
        votes = (labels[neighbours] == labels[:, None]).sum(dim=1)
        # One vote beside the neighbours', shared by all classes, keeps the logarithm finite.
        share = (votes + 1 / n_classes) / (k + 1)
        return (share * n_classes).log() / math.log(n_classes)

    return scores


_METHODS: Mapping[str, Callable[[int], Method]] = {
    "knn": _knn,
    "cosine": _cosine,
    "centroid": _centroid,
    "linear": _linear,
    "divergence": _divergence,
}
WITH_NEIGHBOURS = ("knn", "cosine", "divergence")


def distances(points: Float[Tensor, "point d"]) -> Float[Tensor, "point point"]:
    """Euclidean distances, with every point infinitely far from itself.

    Points at the same distance, such as equal ones, would be ordered by their place in the list,
    that is by task; something random, a ten-millionth of the spread, orders them instead.
    """
    # The mean is taken off first: far from the origin |a|^2 - 2ab + |b|^2 loses the difference.
    centred = (points - points.mean(dim=0)).double()
    squares = centred.square().sum(dim=1)
    squared = squares[:, None] + squares[None] - 2 * (centred @ centred.T)
    chance = torch.rand(squared.shape, generator=torch.Generator().manual_seed(0)).double()
    apart = squared.clamp(min=0).sqrt() + chance * (1e-7 * squares.mean().sqrt() + 1e-30)
    return apart.fill_diagonal_(float("inf"))


def vote(
    voters: Int[Tensor, "*many point k"], nearest: Float[Tensor, "point k"], n_classes: int
) -> Int[Tensor, "*many point"]:
    """The class with most votes; of tied ones the one whose voters are nearer in sum."""
    # A vote weighs one, less a distance so small that it can only decide a tie.
    weights = 1 - nearest / (2 * nearest.sum(dim=1, keepdim=True).clamp(min=1e-30))
    scores = [(weights * (voters == one)).sum(dim=-1) for one in range(n_classes)]
    return torch.stack(scores, dim=-1).argmax(dim=-1)
