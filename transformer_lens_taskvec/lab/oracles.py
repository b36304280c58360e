"""Predictors that know the problem: what a model of the lab could learn at best.

At every point they predict ``y_i`` from the ``i - 1`` pairs before it and ``x_i``. The
Bayes-optimal predictor for sparse linear regression on one of several bases weights the bases by
their exact posterior probability. With ``X_k`` the demonstrations' inputs in the coordinates of
basis ``k`` and ``s`` the noise variance::

    y | X, k  ~  N(0, X_k X_k' + s I)                 evidence, w integrated out
    P(k | X, y)  =  softmax_k  log N(y; 0, X_k X_k' + s I)
    E[y* | x*, X, y]  =  sum_k P(k | X, y) x*_k' (X_k' X_k + s I)^-1 X_k' y
    Var[y* | x*, X, k]  =  s (1 + x*_k' (X_k' X_k + s I)^-1 x*_k)

The determinant and the quadratic form are computed from the ``r x r`` matrix ``X_k' X_k + s I`` by
its Cholesky factor, for all sequences, points and bases at once, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import einsum, rearrange, reduce, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class MixturePosterior:
    """What the demonstrations say about the basis, and the prediction that follows.

    Attributes:
        probabilities: ``P(basis | demonstrations)``, ``[batch, point, task]``.
        by_basis: The prediction if this basis, or noise level, were known to be the true one,
            ``[batch, point, task]``.
        variances: The variance of ``y`` about that prediction, noise included,
            ``[batch, point, task]``.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> half, ones = torch.full((1, 1, 2), 0.5), torch.ones(1, 1, 2)
        >>> even = lab.MixturePosterior(half, torch.tensor([[[1.0, 3.0]]]), ones)
        >>> even.prediction
        tensor([[2.]])
    """

    probabilities: Float[Tensor, "batch point task"]
    by_basis: Float[Tensor, "batch point task"]
    variances: Float[Tensor, "batch point task"]

    @property
    def prediction(self) -> Float[Tensor, "batch point"]:
        """The posterior mean: no predictor has a lower expected squared error."""
        return reduce(self.probabilities * self.by_basis, "batch point task -> batch point", "sum")


def bayes_mixture(
    xs: Float[Tensor, "batch point dim"],
    ys: Float[Tensor, "batch point"],
    *,
    bases: Sequence[Sequence[int]],
    noise_variance: float,
) -> MixturePosterior:
    """Return the exact posterior over bases and the Bayes-optimal prediction at every point.

    Args:
        xs: Inputs, ``[batch, point, dim]``.
        ys: Outputs, ``[batch, point]``.
        bases: The coordinates of each basis; all bases are equally likely beforehand.
        noise_variance: The variance of the noise on ``ys``.

    Returns:
        The posterior given the pairs before each point; uniform at the first point.

    Raises:
        ValueError: If the shapes do not match, a basis names a coordinate that ``xs`` lack, or
            there is no noise, so that the evidence has no density.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> xs = torch.randn(1, 5, 2, generator=torch.Generator().manual_seed(0))
        >>> found = lab.bayes_mixture(xs, xs[..., 1], bases=[[0], [1]], noise_variance=0.01)
        >>> found.probabilities[0, 0], bool(found.probabilities[0, -1, 1] > 0.9)
        (tensor([0.5000, 0.5000]), True)
    """
    largest = max(max(basis) for basis in bases)
    if largest >= xs.shape[-1]:
        raise ValueError(f"bases name coordinate {largest}, but xs have {xs.shape[-1]} dimensions")
    if noise_variance <= 0:
        raise ValueError(
            f"noise_variance is {noise_variance}; a posterior needs a positive variance"
        )
    before = _sums_before(xs, ys)
    rows = [torch.tensor(list(basis), device=xs.device) for basis in bases]
    coordinates = pad_sequence(rows, batch_first=True)
    present = pad_sequence([torch.ones_like(row).double() for row in rows], batch_first=True)
    n_ranks = coordinates.shape[1]
    grams = before.gram[
        ...,
        rearrange(coordinates, "task rank -> task rank 1"),
        rearrange(coordinates, "task rank -> task 1 rank"),
    ]
    grams = grams * einsum(present, present, "task row, task column -> task row column")
    moments = before.moment[..., coordinates] * present
    identity = torch.eye(n_ranks, dtype=torch.float64, device=xs.device)
    factor = torch.linalg.cholesky(grams + noise_variance * identity)
    weights = _solved(factor, moments)
    noise = torch.full((len(rows),), noise_variance, dtype=torch.float64, device=xs.device)
    probabilities = _log_evidence(before, factor, moments, weights, noise).softmax(-1)
    queries = xs.double()[..., coordinates] * present
    by_basis = reduce(queries * weights, "batch point task rank -> batch point task", "sum")
    spread = reduce(
        queries * _solved(factor, queries), "batch point task rank -> batch point task", "sum"
    )
    found = probabilities, by_basis, noise_variance * (1 + spread)
    return MixturePosterior(*(one.to(xs.dtype) for one in found))


def noise_mixture(
    xs: Float[Tensor, "batch point dim"],
    ys: Float[Tensor, "batch point"],
    *,
    noise_variances: Sequence[float],
    weight_variance: float = 1.0,
) -> MixturePosterior:
    """Return the exact posterior over noise levels and the Bayes-optimal prediction.

    With a weight variance ``t``, a level of noise variance ``s`` has the evidence
    ``N(y; 0, t X X' + s I)`` and the prediction of ridge with the penalty ``s / t``.

    Args:
        xs: Inputs, ``[batch, point, dim]``.
        ys: Outputs, ``[batch, point]``.
        noise_variances: Of each level; all levels are equally likely beforehand.
        weight_variance: The prior variance of each weight.

    Returns:
        The posterior given the pairs before each point, with the levels in place of bases.

    Raises:
        ValueError: If the shapes do not match or a variance is not positive.

    Example:
        >>> from transformer_lens_taskvec.lab.oracles import noise_mixture
        >>> xs = torch.randn(1, 9, 2, generator=torch.Generator().manual_seed(0))
        >>> found = noise_mixture(xs, xs[..., 1], noise_variances=[0.01, 1.0])
        >>> found.probabilities[0, 0], bool(found.probabilities[0, -1, 0] > 0.9)
        (tensor([0.5000, 0.5000]), True)
    """
    if not noise_variances or min(*noise_variances, weight_variance) <= 0:
        raise ValueError(
            f"noise_variances is {list(noise_variances)} and weight_variance {weight_variance}; "
            "give at least one noise variance, and positive ones"
        )
    before = _sums_before(xs, ys)
    noise = torch.tensor(noise_variances, dtype=torch.float64, device=xs.device)
    penalties = rearrange(noise / weight_variance, "task -> task 1 1")
    identity = torch.eye(xs.shape[2], dtype=torch.float64, device=xs.device)
    factor = torch.linalg.cholesky(before.gram[:, :, None] + penalties * identity)
    moments = repeat(before.moment, "batch point dim -> batch point task dim", task=len(noise))
    weights = _solved(factor, moments)
    probabilities = _log_evidence(before, factor, moments, weights, noise).softmax(-1)
    queries = repeat(xs.double(), "batch point dim -> batch point task dim", task=len(noise))
    by_level = reduce(queries * weights, "batch point task dim -> batch point task", "sum")
    spread = reduce(
        queries * _solved(factor, queries), "batch point task dim -> batch point task", "sum"
    )
    found = probabilities, by_level, noise * (1 + spread)
    return MixturePosterior(*(one.to(xs.dtype) for one in found))


def true_basis_ridge(
    xs: Float[Tensor, "batch point dim"],
    ys: Float[Tensor, "batch point"],
    labels: Int[Tensor, " batch"],
    *,
    bases: Sequence[Sequence[int]],
    noise_variance: float,
) -> Float[Tensor, "batch point"]:
    """Ridge on the coordinates of each sequence's true basis: the optimum if the basis is known.

    Args:
        xs: Inputs, ``[batch, point, dim]``.
        ys: Outputs, ``[batch, point]``.
        labels: The basis of each sequence, ``[batch]``.
        bases: The coordinates of each basis.
        noise_variance: The variance of the noise on ``ys``.

    Returns:
        Predictions, ``[batch, point]``; zero at the first point.

    Raises:
        ValueError: As for :func:`bayes_mixture`.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> xs, labels = torch.randn(4, 16, 2), torch.ones(4, dtype=torch.long)
        >>> bases = [[0], [1]]
        >>> lab.true_basis_ridge(xs, xs[..., 1], labels, bases=bases, noise_variance=0.01).shape
        torch.Size([4, 16])
    """
    by_basis = bayes_mixture(xs, ys, bases=bases, noise_variance=noise_variance).by_basis
    return by_basis[torch.arange(len(xs), device=xs.device), :, labels.to(xs.device)]


def ridge(
    xs: Float[Tensor, "batch point dim"],
    ys: Float[Tensor, "batch point"],
    *,
    penalty: float = 0.01,
) -> Float[Tensor, "batch point"]:
    """Ridge regression in all dimensions, without an intercept.

    Args:
        xs: Inputs, ``[batch, point, dim]``.
        ys: Outputs, ``[batch, point]``.
        penalty: Weight of ``|w|^2`` relative to the sum of squared errors (scikit-learn's
            ``alpha``). The optimum is the noise variance divided by a weight's prior variance.

    Returns:
        Predictions, ``[batch, point]``; zero at the first point.

    Raises:
        ValueError: If the penalty is not positive (:func:`least_squares` has none).

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> lab.ridge(torch.tensor([[[1.0], [1.0]]]), torch.ones(1, 2), penalty=1.0)
        tensor([[0.0000, 0.5000]])
    """
    if penalty <= 0:
        raise ValueError(f"penalty must be positive, got {penalty}; use least_squares for none")
    before = _sums_before(xs, ys)
    identity = torch.eye(xs.shape[2], dtype=torch.float64, device=xs.device)
    factor = torch.linalg.cholesky(before.gram + penalty * identity)
    return _predict(xs, _solved(factor, before.moment))


def least_squares(
    xs: Float[Tensor, "batch point dim"], ys: Float[Tensor, "batch point"]
) -> Float[Tensor, "batch point"]:
    """Ordinary least squares in all dimensions; the solution of least norm where there are many.

    A direction in which the inputs vary less than 1e-5 times as much as in the widest counts as
    none.

    Args:
        xs: Inputs, ``[batch, point, dim]``.
        ys: Outputs, ``[batch, point]``.

    Returns:
        Predictions, ``[batch, point]``; zero at the first point.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> lab.least_squares(torch.tensor([[[1.0], [2.0]]]), torch.tensor([[3.0, 6.0]]))
        tensor([[0., 6.]])
    """
    before = _sums_before(xs, ys)
    inverse = torch.linalg.pinv(before.gram, hermitian=True, rtol=1e-10)
    weights = einsum(
        inverse, before.moment, "batch point row column, batch point column -> batch point row"
    )
    return _predict(xs, weights)


def lasso(
    xs: Float[Tensor, "batch point dim"],
    ys: Float[Tensor, "batch point"],
    *,
    alpha: float = 0.01,
) -> Float[Tensor, "batch point"]:
    """LASSO in all dimensions, without an intercept: exact, for all prefixes at once.

    Minimises ``|y - X w|^2 / (2 n) + alpha |w|_1``, as scikit-learn does, by an active-set search.
    Given the signs of the weights, the minimum solves a linear system. A weight that would cross
    zero on the way there leaves the active set; the coordinate that violates optimality most enters
    it. Coordinate descent would need thousands of sweeps where pairs and dimensions are about equal
    in number.

    Args:
        xs: Inputs, ``[batch, point, dim]``.
        ys: Outputs, ``[batch, point]``.
        alpha: Weight of ``|w|_1``.

    Returns:
        Predictions, ``[batch, point]``; zero at the first point.

    Raises:
        ValueError: If ``alpha`` is not positive.
        RuntimeError: If the search does not converge, as with inputs that are not finite.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> lab.lasso(torch.tensor([[[1.0], [1.0]]]), torch.ones(1, 2), alpha=0.25)
        tensor([[0.0000, 0.7500]])
    """
    if alpha <= 0:
        raise ValueError(f"alpha must be positive, got {alpha}; use least_squares for none")
    before = _sums_before(xs, ys)
    problem = _Lasso(
        gram=rearrange(before.gram, "batch point row column -> (batch point) row column"),
        moment=rearrange(before.moment, "batch point dim -> (batch point) dim"),
        threshold=repeat(alpha * before.count, "point -> (batch point) 1", batch=len(xs)),
    )
    solution = torch.zeros_like(problem.moment)
    todo = torch.arange(len(solution), device=xs.device)
    weights, signs = solution, solution
    for _ in range(20 * xs.shape[2] + 20):
        weights, signs, optimal = _active_set_step(problem, weights, signs)
        solution[todo[optimal]] = weights[optimal]
        left = ~optimal
        todo, weights, signs = todo[left], weights[left], signs[left]
        if not len(todo):
            weights = rearrange(solution, "(batch point) dim -> batch point dim", batch=len(xs))
            return _predict(xs, weights)
        problem = _Lasso(problem.gram[left], problem.moment[left], problem.threshold[left])
    raise RuntimeError(f"{len(todo)} of {len(solution)} LASSO problems could not be solved")


@dataclass(frozen=True)
class _Lasso:
    """Many problems: minimise ``w' gram w / 2 - moment' w + threshold |w|_1``."""

    gram: Float[Tensor, "problem dim dim"]
    moment: Float[Tensor, "problem dim"]
    threshold: Float[Tensor, "problem 1"]


def _active_set_step(
    problem: _Lasso, weights: Float[Tensor, "problem dim"], signs: Float[Tensor, "problem dim"]
) -> tuple[Float[Tensor, "problem dim"], Float[Tensor, "problem dim"], Bool[Tensor, " problem"]]:
    """Change each problem's active set once; its members have a sign of 1 or -1.

    Returns:
        The weights, the signs, and whether the weights are optimal.
    """
    active = signs.abs()
    # The small ridge keeps a singular system's step finite; the step ends at the nearest zero.
    diagonal = torch.diag_embed(1 - active + 1e-11 * active)
    both_active = einsum(active, active, "problem row, problem column -> problem row column")
    system = problem.gram * both_active + diagonal
    target = torch.linalg.solve(system, (problem.moment - problem.threshold * signs) * active)
    crosses = (target * signs <= 0) & (active > 0)
    way = weights - target
    share = torch.where(crosses, weights / torch.where(way == 0, 1.0, way), torch.inf)
    step = share.amin(-1, keepdim=True).clamp(max=1.0)
    arrived = (step == 1.0)[:, 0] & ~crosses.any(-1)
    left = share <= step
    weights = torch.where(left, 0.0, weights - step * way)
    signs = torch.where(left, 0.0, signs)
    pull = einsum(problem.gram, weights, "problem row column, problem column -> problem row")
    slope = problem.moment - pull
    excess, worst = ((slope.abs() - problem.threshold) * (1 - active)).max(-1, keepdim=True)
    enters = arrived[:, None] & (excess > 1e-9 * (1 + problem.threshold))
    entered = torch.where(enters, slope.gather(1, worst).sign(), signs.gather(1, worst))
    return weights, signs.scatter(1, worst, entered), arrived & ~enters[:, 0]


@dataclass(frozen=True)
class _Sums:
    """Sums over the pairs before each point, in float64."""

    gram: Float[Tensor, "batch point dim dim"]
    moment: Float[Tensor, "batch point dim"]
    square: Float[Tensor, "batch point"]
    count: Float[Tensor, " point"]


def _sums_before(xs: Float[Tensor, "batch point dim"], ys: Float[Tensor, "batch point"]) -> _Sums:
    if xs.ndim != 3 or ys.shape != xs.shape[:2]:
        raise ValueError(
            f"xs must be [batch, point, dim] and ys [batch, point]; got {list(xs.shape)} and "
            f"{list(ys.shape)}"
        )
    x, y = xs.double(), ys.double()

    def before(terms: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(terms[:, :1]), terms[:, :-1].cumsum(1)], dim=1)

    return _Sums(
        gram=before(einsum(x, x, "batch point row, batch point column -> batch point row column")),
        moment=before(x * y[..., None]),
        square=before(y.square()),
        count=torch.arange(xs.shape[1], dtype=torch.float64, device=xs.device),
    )


def _predict(
    xs: Float[Tensor, "batch point dim"], weights: Float[Tensor, "batch point dim"]
) -> Float[Tensor, "batch point"]:
    products = xs.double() * weights
    return reduce(products, "batch point dim -> batch point", "sum").to(xs.dtype)


def _solved(
    factor: Float[Tensor, "*problem dim dim"], target: Float[Tensor, "*problem dim"]
) -> Float[Tensor, "*problem dim"]:
    """The solution of linear systems, given the Cholesky factors of their matrices."""
    return torch.cholesky_solve(rearrange(target, "... dim -> ... dim 1"), factor).squeeze(-1)


def _log_evidence(
    before: _Sums,
    factor: Float[Tensor, "batch point task dim dim"],
    moments: Float[Tensor, "batch point task dim"],
    weights: Float[Tensor, "batch point task dim"],
    noise: Float[Tensor, " task"],
) -> Float[Tensor, "batch point task"]:
    """The log evidence of each task, up to a constant, from its ridge regression's solution."""
    explained = reduce(moments * weights, "batch point task dim -> batch point task", "sum")
    quadratic = (before.square[..., None] - explained) / noise
    log_determinant = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    spare = before.count[:, None] - moments.shape[-1]
    return -0.5 * (log_determinant + spare * noise.log() + quadratic)
