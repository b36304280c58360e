"""Predictors that know the problem: what a model of the lab could at best have learnt.

At every position, from the pairs before it: least squares and ridge in all dimensions, LASSO, ridge
on the true basis, and the Bayes-optimal predictor of a :class:`SparseLinearMixture`, which weighs
the bases by their exact posterior probability. With ``X_k`` the demonstrations' inputs in the
coordinates of basis ``k`` and ``s`` the noise variance::

    y | X, k  ~  N(0, X_k X_k' + s I)                 evidence, w integrated out
    P(k | X, y)  =  softmax_k  log N(y; 0, X_k X_k' + s I)
    E[y* | x*, X, y]  =  sum_k P(k | X, y) x*_k' (X_k' X_k + s I)^-1 X_k' y

The determinant and the quadratic form are taken from the ``r x r`` matrix ``X_k' X_k + s I`` by its
Cholesky factor, for all sequences, positions and bases at once, in float64. All functions return
what they predict for ``y_i`` from the ``i - 1`` pairs before and ``x_i``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_taskvec.lab.problems.base import Batch, Mixture
from transformer_lens_taskvec.lab.problems.sparse_linear import SparseLinearMixture

_SEQUENCES_AT_ONCE = 1000


@dataclass(frozen=True)
class MixturePosterior:
    """What the demonstrations say about the basis, and what follows for the query.

    Attributes:
        probabilities: ``P(basis | demonstrations)``, ``[batch, point, task]``.
        by_basis: The prediction if the basis were known to be this one, ``[batch, point, task]``.

    Example:
        >>> import torch
        >>> from transformer_lens_taskvec import lab
        >>> mixture = lab.SparseLinearMixture.small()
        >>> batch = mixture.sample(4, torch.Generator().manual_seed(0))
        >>> posterior = lab.bayes_mixture(mixture, batch.xs, batch.ys)
        >>> posterior.probabilities.shape, posterior.prediction.shape
        (torch.Size([4, 16, 4]), torch.Size([4, 16]))
    """

    probabilities: Float[Tensor, "batch point task"]
    by_basis: Float[Tensor, "batch point task"]

    @property
    def prediction(self) -> Float[Tensor, "batch point"]:
        """The posterior mean, which no predictor's expected squared error is below."""
        return (self.probabilities * self.by_basis).sum(-1)


def bayes_mixture(
    mixture: SparseLinearMixture,
    xs: Float[Tensor, "batch point dim"],
    ys: Float[Tensor, "batch point"],
) -> MixturePosterior:
    """The exact posterior over bases and the Bayes-optimal prediction, at every position.

    Args:
        mixture: What the sequences are drawn from; its bases are equally likely.
        xs: Inputs, ``[batch, point, dim]``.
        ys: Outputs, ``[batch, point]``.

    Returns:
        The posterior given the pairs before each point; uniform at the first.

    Raises:
        ValueError: If the shapes do not fit, or the mixture has no noise: then the evidence of a
            wrong basis is zero and that of the right one has no density.

    Example:
        >>> import torch
        >>> from transformer_lens_taskvec import lab
        >>> mixture = lab.SparseLinearMixture.small()
        >>> batch = mixture.sample(4, torch.Generator().manual_seed(0))
        >>> posterior = lab.bayes_mixture(mixture, batch.xs, batch.ys)
        >>> posterior.probabilities[0, 0].tolist()  # before the first pair
        [0.25, 0.25, 0.25, 0.25]
        >>> of_truth = posterior.probabilities[torch.arange(4), -1, batch.labels]
        >>> bool(of_truth.mean() > 0.5)
        True
    """
    _check(xs, ys)
    if xs.shape[2] != mixture.dim:
        raise ValueError(f"xs have {xs.shape[2]} dimensions, the mixture has {mixture.dim}")
    noise = mixture.noise_variance
    if noise <= 0:
        raise ValueError(f"mixture.noise_variance must be positive for a posterior, got {noise}")
    before = _sums_before(xs, ys)
    coordinates, present = _padded_bases(mixture, xs.device)
    rank = coordinates.shape[1]
    grams = before.gram[..., coordinates[:, :, None], coordinates[:, None, :]]
    grams = grams * (present[:, :, None] * present[:, None, :])
    moments = (before.moment[..., coordinates] * present)[..., None]
    identity = torch.eye(rank, dtype=torch.float64, device=xs.device)
    factor = torch.linalg.cholesky(grams + noise * identity)
    weights = torch.cholesky_solve(moments, factor)
    explained = (moments * weights).sum((-2, -1))
    log_determinant = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_determinant = log_determinant + (before.count[:, None] - rank) * math.log(noise)
    quadratic = (before.square[..., None] - explained) / noise
    probabilities = (-0.5 * (log_determinant + quadratic)).softmax(-1)
    queries = xs.double()[..., coordinates] * present
    by_basis = (queries * weights.squeeze(-1)).sum(-1)
    return MixturePosterior(probabilities.to(xs.dtype), by_basis.to(xs.dtype))


def true_basis_ridge(
    mixture: SparseLinearMixture,
    xs: Float[Tensor, "batch point dim"],
    ys: Float[Tensor, "batch point"],
    labels: Int[Tensor, " batch"],
) -> Float[Tensor, "batch point"]:
    """Ridge on the coordinates of each sequence's true basis: the optimum if the basis is known.

    Args:
        mixture: What the sequences are drawn from.
        xs: Inputs, ``[batch, point, dim]``.
        ys: Outputs, ``[batch, point]``.
        labels: The basis of each sequence, ``[batch]``.

    Returns:
        Predictions, ``[batch, point]``; zero at the first point.

    Example:
        >>> import torch
        >>> from transformer_lens_taskvec import lab
        >>> mixture = lab.SparseLinearMixture.small()
        >>> batch = mixture.sample(4, torch.Generator().manual_seed(0))
        >>> predicted = lab.true_basis_ridge(mixture, batch.xs, batch.ys, batch.labels)
        >>> late = (predicted - batch.ys)[:, 8:].square().mean()
        >>> float(late) < 0.05  # the noise has a variance of 0.01
        True
    """
    by_basis = bayes_mixture(mixture, xs, ys).by_basis
    chosen = labels.to(xs.device)[:, None, None].expand(-1, xs.shape[1], 1)
    return by_basis.gather(2, chosen).squeeze(2)


def ridge(
    xs: Float[Tensor, "batch point dim"],
    ys: Float[Tensor, "batch point"],
    *,
    penalty: float = 0.01,
) -> Float[Tensor, "batch point"]:
    """Ridge regression in all dimensions, without intercept.

    Args:
        xs: Inputs.
        ys: Outputs.
        penalty: Weight of ``|w|^2`` beside the sum of squared errors (scikit-learn's ``alpha``);
            the noise variance divided by the prior variance of a weight is optimal.

    Returns:
        Predictions, ``[batch, point]``; zero at the first point.

    Raises:
        ValueError: If the penalty is not positive (:func:`least_squares` has none).

    Example:
        >>> import torch
        >>> from transformer_lens_taskvec import lab
        >>> mixture = lab.SparseLinearMixture.small()
        >>> batch = mixture.sample(4, torch.Generator().manual_seed(0))
        >>> predicted = lab.ridge(batch.xs, batch.ys)
        >>> predicted.shape, predicted[:, 0].tolist()
        (torch.Size([4, 16]), [0.0, 0.0, 0.0, 0.0])
    """
    _check(xs, ys)
    if penalty <= 0:
        raise ValueError(f"penalty must be positive, got {penalty}; without one: least_squares")
    before = _sums_before(xs, ys)
    identity = torch.eye(xs.shape[2], dtype=torch.float64, device=xs.device)
    factor = torch.linalg.cholesky(before.gram + penalty * identity)
    return _predict(xs, torch.cholesky_solve(before.moment[..., None], factor).squeeze(-1))


def least_squares(
    xs: Float[Tensor, "batch point dim"], ys: Float[Tensor, "batch point"]
) -> Float[Tensor, "batch point"]:
    """Ordinary least squares in all dimensions: of least norm where it is not determined.

    Args:
        xs: Inputs, ``[batch, point, dim]``.
        ys: Outputs, ``[batch, point]``.

    Returns:
        Predictions, ``[batch, point]``; zero at the first point.

    Example:
        >>> import torch
        >>> from transformer_lens_taskvec import lab
        >>> mixture = lab.SparseLinearMixture.small()
        >>> batch = mixture.sample(4, torch.Generator().manual_seed(0))
        >>> lab.least_squares(batch.xs, batch.ys).shape
        torch.Size([4, 16])
    """
    _check(xs, ys)
    before = _sums_before(xs, ys)
    inverse = torch.linalg.pinv(before.gram, hermitian=True, rtol=1e-10)
    return _predict(xs, (inverse @ before.moment[..., None]).squeeze(-1))


def lasso(
    xs: Float[Tensor, "batch point dim"],
    ys: Float[Tensor, "batch point"],
    *,
    alpha: float = 0.01,
) -> Float[Tensor, "batch point"]:
    """LASSO in all dimensions, without intercept: exact, on all prefixes at once.

    Minimises ``|y - X w|^2 / (2 n) + alpha |w|_1``, as scikit-learn does, by an active-set search:
    with its signs given, the minimum is a linear system's solution; a weight that would cross zero
    on the way there leaves the set, the coordinate that violates optimality most enters it. Where
    there are about as many pairs as dimensions, coordinate descent would need thousands of sweeps.

    Args:
        xs: Inputs.
        ys: Outputs.
        alpha: Weight of ``|w|_1``.

    Returns:
        Predictions, ``[batch, point]``; zero at the first point.

    Raises:
        ValueError: If ``alpha`` is not positive.
        RuntimeError: If the search does not end, which points to inputs that are not finite.

    Example:
        >>> import torch
        >>> from transformer_lens_taskvec import lab
        >>> mixture = lab.SparseLinearMixture.small()
        >>> batch = mixture.sample(4, torch.Generator().manual_seed(0))
        >>> lab.lasso(batch.xs, batch.ys, alpha=0.01).shape
        torch.Size([4, 16])
    """
    _check(xs, ys)
    if alpha <= 0:
        raise ValueError(f"alpha must be positive, got {alpha}; without it: least_squares")
    before = _sums_before(xs, ys)
    dim = xs.shape[2]
    problem = _Lasso(
        gram=before.gram.reshape(-1, dim, dim),
        moment=before.moment.reshape(-1, dim),
        threshold=(alpha * before.count).expand(len(xs), -1).reshape(-1, 1),
    )
    solution = torch.zeros_like(problem.moment)
    todo = torch.arange(len(solution), device=xs.device)
    weights, signs = solution, solution
    for _ in range(20 * dim + 20):
        weights, signs, optimal = _active_set_step(problem, weights, signs)
        solution[todo[optimal]] = weights[optimal]
        todo, weights, signs = todo[~optimal], weights[~optimal], signs[~optimal]
        if not len(todo):
            return _predict(xs, solution.view(xs.shape))
        problem = problem.at(~optimal)
    raise RuntimeError(f"{len(todo)} of {len(solution)} LASSO problems could not be solved")


@dataclass(frozen=True)
class _Lasso:
    """Minimise ``w' gram w / 2 - moment' w + threshold |w|_1``, for many problems."""

    gram: Float[Tensor, "problem dim dim"]
    moment: Float[Tensor, "problem dim"]
    threshold: Float[Tensor, "problem 1"]

    def at(self, chosen: Bool[Tensor, " problem"]) -> _Lasso:
        """Some of the problems."""
        return _Lasso(self.gram[chosen], self.moment[chosen], self.threshold[chosen])


def _active_set_step(
    problem: _Lasso, weights: Float[Tensor, "problem dim"], signs: Float[Tensor, "problem dim"]
) -> tuple[Float[Tensor, "problem dim"], Float[Tensor, "problem dim"], Bool[Tensor, " problem"]]:
    """One change of each problem's active set, whose members have a sign of 1 or -1.

    Returns:
        The weights, the signs, and whether the weights are optimal.
    """
    active = signs.abs()
    # The ridge makes a singular system's step long instead of infinite; the nearest zero ends it.
    diagonal = torch.diag_embed(1 - active + 1e-11 * active)
    system = problem.gram * active[:, :, None] * active[:, None, :] + diagonal
    target = torch.linalg.solve(system, (problem.moment - problem.threshold * signs) * active)
    crosses = (target * signs <= 0) & (active > 0)
    way = weights - target
    share = torch.where(crosses, weights / torch.where(way == 0, 1.0, way), torch.inf)
    step = share.amin(-1, keepdim=True).clamp(max=1.0)
    arrived = (step == 1.0)[:, 0] & ~crosses.any(-1)
    left = share <= step
    weights = torch.where(left, 0.0, weights - step * way)
    signs = torch.where(left, 0.0, signs)
    slope = problem.moment - (problem.gram @ weights[..., None]).squeeze(-1)
    excess, worst = ((slope.abs() - problem.threshold) * (1 - active)).max(-1, keepdim=True)
    enters = arrived[:, None] & (excess > 1e-9 * (1 + problem.threshold))
    entered = torch.where(enters, slope.gather(1, worst).sign(), signs.gather(1, worst))
    return weights, signs.scatter(1, worst, entered), arrived & ~enters[:, 0]


@dataclass(frozen=True)
class OracleErrors:
    """Mean squared error of each oracle at each position.

    Attributes:
        names: The oracles.
        mse: ``[oracle, point]``.
        n_sequences: Sequences that the means are over.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> errors = lab.oracle_errors(lab.SparseLinearMixture.small(), n_sequences=50)
        >>> errors["ridge"].shape, errors.late("Bayes mixture") < errors.late("ridge")
        (torch.Size([16]), True)
    """

    names: tuple[str, ...]
    mse: Float[Tensor, "oracle point"]
    n_sequences: int

    def __getitem__(self, name: str) -> Float[Tensor, " point"]:
        """The error curve of one oracle."""
        if name not in self.names:
            raise KeyError(f"no oracle {name!r}; there are {', '.join(self.names)}")
        return self.mse[self.names.index(name)]

    def late(self, name: str) -> float:
        """The mean error over the second half of the positions."""
        curve = self[name]
        return float(curve[len(curve) // 2 :].mean())

    def __repr__(self) -> str:
        late = ", ".join(f"{name} {self.late(name):.4f}" for name in self.names)
        return f"OracleErrors(second half of {self.mse.shape[1]} positions: {late})"


def oracle_errors(
    mixture: Mixture,
    *,
    n_sequences: int = 10_000,
    alpha: float = 0.01,
    penalty: float | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> OracleErrors:
    """The expected error of every oracle that the mixture has, at every position.

    Args:
        mixture: What the sequences are drawn from. Any mixture has ``"least squares"``,
            ``"ridge"`` and ``"lasso"``; a :class:`SparseLinearMixture` has ``"true basis"`` and
            ``"Bayes mixture"`` too.
        n_sequences: Sequences to average over.
        alpha: LASSO's weight.
        penalty: Ridge's weight; by default the best one for a sparse linear mixture (noise variance
            divided by the mean variance of a weight), and 0.01 for any other.
        seed: Seed of the sequences.
        device: Where to compute.

    Returns:
        The errors.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> errors = lab.oracle_errors(lab.SparseLinearMixture.small(), n_sequences=50)
        >>> errors.names
        ('least squares', 'ridge', 'lasso', 'true basis', 'Bayes mixture')
    """
    generator = torch.Generator(device).manual_seed(seed)
    total: dict[str, Tensor] = {}
    for start in range(0, n_sequences, _SEQUENCES_AT_ONCE):
        batch = mixture.sample(min(_SEQUENCES_AT_ONCE, n_sequences - start), generator)
        predictions = oracle_predictions(mixture, batch, alpha=alpha, penalty=penalty)
        for name, prediction in predictions.items():
            errors = (prediction - batch.ys).square().sum(0).double()
            total[name] = total[name] + errors if name in total else errors
    curves = torch.stack(list(total.values())) / n_sequences
    return OracleErrors(tuple(total), curves.float().cpu(), n_sequences)


def oracle_predictions(
    mixture: Mixture, batch: Batch, *, alpha: float = 0.01, penalty: float | None = None
) -> dict[str, Float[Tensor, "batch point"]]:
    """What every oracle that the mixture has predicts for some sequences, at every position.

    Args:
        mixture: What the sequences are drawn from.
        batch: The sequences.
        alpha: As for :func:`oracle_errors`.
        penalty: As for :func:`oracle_errors`.

    Returns:
        Predictions by the oracles' names, ``[batch, point]`` each.

    Example:
        >>> import torch
        >>> from transformer_lens_taskvec import lab
        >>> mixture = lab.SparseLinearMixture.small()
        >>> batch = mixture.sample(4, torch.Generator().manual_seed(0))
        >>> sorted(lab.oracle_predictions(mixture, batch))
        ['Bayes mixture', 'lasso', 'least squares', 'ridge', 'true basis']
    """
    if penalty is None:
        penalty = _best_penalty(mixture)
    predictions = {
        "least squares": least_squares(batch.xs, batch.ys),
        "ridge": ridge(batch.xs, batch.ys, penalty=penalty),
        "lasso": lasso(batch.xs, batch.ys, alpha=alpha),
    }
    if isinstance(mixture, SparseLinearMixture):
        predictions["true basis"] = true_basis_ridge(mixture, batch.xs, batch.ys, batch.labels)
        predictions["Bayes mixture"] = bayes_mixture(mixture, batch.xs, batch.ys).prediction
    return predictions


def _best_penalty(mixture: Mixture) -> float:
    if not isinstance(mixture, SparseLinearMixture) or mixture.noise_variance == 0:
        return 0.01
    mean_rank = sum(len(basis) for basis in mixture.bases) / len(mixture.bases)
    return mixture.noise_variance * mixture.dim / mean_rank


@dataclass(frozen=True)
class _Sums:
    """Sums over the pairs before each point, in float64."""

    gram: Float[Tensor, "batch point dim dim"]
    moment: Float[Tensor, "batch point dim"]
    square: Float[Tensor, "batch point"]
    count: Float[Tensor, " point"]


def _sums_before(xs: Float[Tensor, "batch point dim"], ys: Float[Tensor, "batch point"]) -> _Sums:
    x, y = xs.double(), ys.double()

    def before(terms: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(terms[:, :1]), terms[:, :-1].cumsum(1)], dim=1)

    return _Sums(
        gram=before(x[..., :, None] * x[..., None, :]),
        moment=before(x * y[..., None]),
        square=before(y.square()),
        count=torch.arange(xs.shape[1], dtype=torch.float64, device=xs.device),
    )


def _predict(
    xs: Float[Tensor, "batch point dim"], weights: Float[Tensor, "batch point dim"]
) -> Float[Tensor, "batch point"]:
    return (xs.double() * weights).sum(-1).to(xs.dtype)


def _padded_bases(
    mixture: SparseLinearMixture, device: torch.device
) -> tuple[Int[Tensor, "task rank"], Float[Tensor, "task rank"]]:
    """The bases' coordinates, filled up to the largest rank, and which of them are real."""
    rank = max(len(basis) for basis in mixture.bases)
    coordinates = [list(basis) + [0] * (rank - len(basis)) for basis in mixture.bases]
    present = [[1.0] * len(basis) + [0.0] * (rank - len(basis)) for basis in mixture.bases]
    return (
        torch.tensor(coordinates, device=device),
        torch.tensor(present, dtype=torch.float64, device=device),
    )


def _check(xs: Tensor, ys: Tensor) -> None:
    if xs.ndim != 3 or ys.shape != xs.shape[:2]:
        raise ValueError(
            f"xs must be [batch, point, dim] and ys [batch, point]; got {list(xs.shape)} and "
            f"{list(ys.shape)}"
        )
