"""The oracles against scikit-learn, scipy, and each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.linear_model import Lasso, Ridge

from transformer_lens_taskvec.lab.evaluation import oracle_errors
from transformer_lens_taskvec.lab.oracles import (
    MixturePosterior,
    bayes_mixture,
    lasso,
    least_squares,
    ridge,
    true_basis_ridge,
)
from transformer_lens_taskvec.lab.problems.base import Batch
from transformer_lens_taskvec.lab.problems.families import RegressionFamilies
from transformer_lens_taskvec.lab.problems.sparse_linear import SparseLinearMixture

pytestmark = pytest.mark.usefixtures("one_thread")

PROBLEMS = {
    "default": SparseLinearMixture(),
    "small": SparseLinearMixture.small(),
    "overlapping": SparseLinearMixture.overlapping(n_points=8),
    "ranks differ": SparseLinearMixture(dim=5, bases=((0,), (1, 2, 3), (3, 4)), n_points=7),
}


def draw(problem: SparseLinearMixture, n: int, seed: int = 0) -> Batch:
    return problem.sample(n, torch.Generator().manual_seed(seed))


def known(problem: SparseLinearMixture) -> dict[str, Any]:
    return {"bases": problem.bases, "noise_variance": problem.noise_variance}


def bayes(problem: SparseLinearMixture, batch: Batch) -> MixturePosterior:
    return bayes_mixture(batch.xs, batch.ys, **known(problem))


@pytest.mark.parametrize("penalty", [0.01, 1.0])
def test_ridge_is_scikit_learns(penalty: float) -> None:
    batch = draw(SparseLinearMixture(), 6)
    found = ridge(batch.xs, batch.ys, penalty=penalty)
    assert (found[:, 0] == 0).all()
    for row in range(6):
        x, y = batch.xs[row].double().numpy(), batch.ys[row].double().numpy()
        for point in range(1, 20):
            model = Ridge(alpha=penalty, fit_intercept=False).fit(x[:point], y[:point])
            np.testing.assert_allclose(
                found[row, point], model.predict(x[point : point + 1])[0], atol=1e-5
            )


@pytest.mark.parametrize("alpha", [0.005, 0.05, 0.5])
def test_lasso_is_scikit_learns(alpha: float) -> None:
    batch = draw(SparseLinearMixture.small(), 6)
    found = lasso(batch.xs, batch.ys, alpha=alpha)
    assert (found[:, 0] == 0).all()
    for row in range(6):
        x, y = batch.xs[row].double().numpy(), batch.ys[row].double().numpy()
        for point in range(1, 16):
            model = Lasso(alpha=alpha, fit_intercept=False, tol=1e-12, max_iter=5_000_000)
            expected = model.fit(x[:point], y[:point]).predict(x[point : point + 1])[0]
            np.testing.assert_allclose(found[row, point], expected, atol=1e-4)


def test_least_squares_is_numpys_least_norm_solution() -> None:
    batch = draw(SparseLinearMixture.small(), 5)
    found = least_squares(batch.xs, batch.ys)
    for row in range(5):
        x, y = batch.xs[row].double().numpy(), batch.ys[row].double().numpy()
        for point in range(1, 16):
            expected = x[point] @ np.linalg.lstsq(x[:point], y[:point], rcond=None)[0]
            np.testing.assert_allclose(found[row, point], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", list(PROBLEMS))
def test_the_posterior_is_the_normalised_evidence(name: str) -> None:
    problem = PROBLEMS[name]
    batch = draw(problem, 4, seed=1)
    found = problem.posterior(batch)
    assert torch.equal(found, bayes(problem, batch).probabilities)
    torch.testing.assert_close(found.sum(-1), torch.ones(4, problem.n_points))
    torch.testing.assert_close(found[:, 0], torch.full_like(found[:, 0], 1 / len(problem.bases)))
    for row in range(4):
        x, y = batch.xs[row].double().numpy(), batch.ys[row].double().numpy()
        for point in range(1, problem.n_points):
            evidence = []
            for basis in problem.bases:
                inputs = x[:point, list(basis)]
                covariance = inputs @ inputs.T + problem.noise_variance * np.eye(point)
                evidence.append(multivariate_normal(cov=covariance).logpdf(y[:point]))
            expected = np.exp(np.array(evidence) - np.logaddexp.reduce(evidence))
            np.testing.assert_allclose(found[row, point], expected, atol=1e-5)


@pytest.mark.parametrize("name", list(PROBLEMS))
def test_the_prediction_of_a_known_basis_is_ridge_on_its_coordinates(name: str) -> None:
    problem = PROBLEMS[name]
    batch = draw(problem, 30)
    of_truth = true_basis_ridge(batch.xs, batch.ys, batch.labels, **known(problem))
    by_basis = bayes(problem, batch).by_basis
    for k, basis in enumerate(problem.bases):
        expected = ridge(batch.xs[..., list(basis)], batch.ys, penalty=problem.noise_variance)
        torch.testing.assert_close(by_basis[..., k], expected, atol=1e-4, rtol=1e-4)
        chosen = batch.labels == k
        torch.testing.assert_close(of_truth[chosen], expected[chosen], atol=1e-4, rtol=1e-4)


def test_the_posterior_is_calibrated() -> None:
    problem = SparseLinearMixture.small(n_points=4)
    batch = draw(problem, 20_000)
    probability = bayes(problem, batch).probabilities[:, 2]
    right = torch.nn.functional.one_hot(batch.labels, 4).float()
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        members = (probability >= low) & (probability < low + 0.2)
        share, claimed = right[members].mean(), probability[members].mean()
        assert abs(share - claimed) < 0.02


@pytest.mark.parametrize(("name", "n_sequences"), [("default", 2_000), ("small", 10_000)])
def test_no_predictor_without_the_basis_beats_the_mixture_predictor(
    name: str, n_sequences: int
) -> None:
    errors = oracle_errors(PROBLEMS[name], n_sequences=n_sequences)
    mean = dict(zip(errors.names, errors.loss.mean(1).tolist(), strict=True))
    assert mean["true basis"] < mean["Bayes mixture"]
    for other in ("least squares", "ridge", "lasso"):
        assert mean["Bayes mixture"] < mean[other]
    curve = errors["Bayes mixture"]
    assert curve[0] > 100 * curve[-1] > PROBLEMS[name].noise_variance * 100


def test_no_penalty_makes_ridge_better_than_the_default() -> None:
    problem = SparseLinearMixture.small()
    batch = draw(problem, 2000)

    def loss(penalty: float) -> float:
        return float((ridge(batch.xs, batch.ys, penalty=penalty) - batch.ys).square().mean())

    default = float(oracle_errors(problem, n_sequences=2000)["ridge"].mean())
    assert default == pytest.approx(loss(0.04), rel=0.05)
    assert loss(0.04) < min(loss(0.004), loss(0.4))


def test_families_have_the_oracles_that_need_no_basis() -> None:
    errors = oracle_errors(RegressionFamilies(dim=5, n_points=9), n_sequences=100)
    assert errors.names == ("least squares", "ridge", "lasso") and errors.told == ()
    assert "ridge" in repr(errors)
    assert errors.late("ridge") == pytest.approx(float(errors["ridge"][4:].mean()))
    with pytest.raises(KeyError, match="no oracle 'Bayes mixture'"):
        errors["Bayes mixture"]


@dataclass(frozen=True)
class WithOracles(SparseLinearMixture):
    """Has oracles that read the label, the future, and nothing."""

    def oracles(self, batch: Batch) -> dict[str, Any]:
        told = batch.ys + 0.1 * batch.labels[:, None]
        return {"told": told, "future": batch.ys + 0.2, "zero": torch.zeros_like(batch.ys)}


def test_oracles_that_read_the_task_are_found_and_none_is_held_as_the_best() -> None:
    errors = oracle_errors(WithOracles(), n_sequences=30)
    assert errors.told == ("told",) and errors.best == "future"
    assert errors.late("future") == pytest.approx(0.04, rel=1e-3)
    assert oracle_errors(SparseLinearMixture(), n_sequences=5).told == ("true basis",)
    without_noise = SparseLinearMixture(noise_variance=0.0)
    assert oracle_errors(without_noise, n_sequences=5).names == ("least squares", "ridge", "lasso")


def test_oracles_of_the_wrong_shape_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WithOracles, "oracles", lambda self, batch: {"flat": batch.ys[:, 0]})
    with pytest.raises(ValueError, match=r"oracle 'flat' of WithOracles gives .* shape \(5,\)"):
        oracle_errors(WithOracles(), n_sequences=5)
    monkeypatch.setattr(WithOracles, "oracles", lambda self, batch: {})
    with pytest.raises(ValueError, match="WithOracles.oracles gives no predictions"):
        oracle_errors(WithOracles(), n_sequences=5)


def test_wrong_arguments_are_named() -> None:
    batch = draw(SparseLinearMixture(), 2)
    with pytest.raises(ValueError, match="penalty must be positive"):
        ridge(batch.xs, batch.ys, penalty=0.0)
    with pytest.raises(ValueError, match="alpha must be positive"):
        lasso(batch.xs, batch.ys, alpha=0.0)
    with pytest.raises(ValueError, match="bases name coordinate 23, but xs have 16"):
        bayes(SparseLinearMixture.orthogonal(6, 4), batch)
    with pytest.raises(ValueError, match="a posterior needs a positive variance"):
        bayes(SparseLinearMixture(noise_variance=0.0), batch)
    with pytest.raises((ValueError, TypeError), match="batch,? point"):  # or jaxtyping's check
        ridge(batch.xs, batch.ys[:, :-1])
