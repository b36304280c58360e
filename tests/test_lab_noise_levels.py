"""Noise levels: risks against the published numbers, the mixture against scipy, and the finding."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.metrics import r2_score

from transformer_lens_taskvec import lab
from transformer_lens_taskvec.activations import Activations, Source
from transformer_lens_taskvec.lab.oracles import noise_mixture
from transformer_lens_taskvec.lab.problems.noise_levels import NoisyLinear, ridge_risk
from transformer_lens_taskvec.lab.problems.readings import (
    drawn,
    probe_r2,
    read_stream,
    swap_distances,
)
from transformer_lens_taskvec.lab.training.on_problem import Run

pytestmark = pytest.mark.usefixtures("one_thread")

PROBLEM = NoisyLinear((0.1, 0.4, 1.0), dim=3, n_points=7)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = lab.TrainConfig(
        problem=PROBLEM,
        **{
            **PROBLEM.defaults,
            "n_layers": 2,
            "n_heads": 2,
            "d_model": 16,
            "steps": 40,
            "batch_size": 16,
            "n_checkpoints": 2,
            "n_eval": 10,
        },
    )
    trained: Run = lab.train(config, tmp_path_factory.mktemp("noise"), progress=False, device="cpu")
    return trained


@pytest.mark.parametrize(
    ("sigma", "published"),
    [(0.1, {0.2: 0.1146, 5.0: 0.268, 1.0: 0.148}), (0.5, {5.0: 0.647, 0.2: 1.445, 1.0: 0.811})],
)
def test_the_risk_has_the_published_values(sigma: float, published: dict[float, float]) -> None:
    risk = ridge_risk(list(published), sigma=sigma, dim=20, n_shots=20)
    assert risk.tolist() == pytest.approx(list(published.values()), rel=0.01)


def test_the_risk_is_the_error_of_ridge_and_least_at_its_own_penalty() -> None:
    batch = drawn(PROBLEM, 20_000, seed=0)
    oracles = PROBLEM.oracles(batch)
    for level, sigma in enumerate(PROBLEM.sigmas):
        risk = ridge_risk(PROBLEM.penalties, sigma=sigma, dim=3, n_shots=6)
        assert int(risk.argmin()) == level
        rows = batch.labels == level
        for other, task in enumerate(PROBLEM.tasks):
            errors = (oracles[f"ridge for {task}"] - batch.ys)[rows, -1].square()
            interval = 4 * float(errors.std()) / len(errors) ** 0.5
            assert float(errors.mean()) == pytest.approx(float(risk[other]), abs=interval + 1e-3)


def test_the_mixture_is_the_brute_force_one() -> None:
    batch = drawn(PROBLEM, 2, seed=1)
    variances, weight = [sigma**2 for sigma in PROBLEM.sigmas], 1 / 3
    found = noise_mixture(batch.xs, batch.ys, noise_variances=variances, weight_variance=weight)
    for row in range(len(batch.xs)):
        x, y = batch.xs[row].double().numpy(), batch.ys[row].double().numpy()
        for point in range(1, 7):
            logs, ridges = [], []
            for variance in variances:
                covariance = weight * x[:point] @ x[:point].T + variance * np.eye(point)
                logs.append(multivariate_normal(np.zeros(point), covariance).logpdf(y[:point]))
                model = Ridge(alpha=variance / weight, fit_intercept=False).fit(
                    x[:point], y[:point]
                )
                ridges.append(model.predict(x[point : point + 1])[0])
            posterior = np.exp(np.array(logs) - np.logaddexp.reduce(logs))
            np.testing.assert_allclose(found.probabilities[row, point], posterior, atol=1e-5)
            np.testing.assert_allclose(found.by_basis[row, point], ridges, atol=1e-5)
            cross = weight * x[:point] @ x[point]
            spreads = [
                weight * x[point] @ x[point]
                + variance
                - cross
                @ np.linalg.solve(
                    weight * x[:point] @ x[:point].T + variance * np.eye(point), cross
                )
                for variance in variances
            ]
            np.testing.assert_allclose(found.variances[row, point], spreads, rtol=1e-5)
            np.testing.assert_allclose(found.prediction[row, point], posterior @ ridges, atol=1e-5)
    assert torch.allclose(found.probabilities[:, 0], torch.tensor(1 / 3))


def test_the_posterior_is_calibrated() -> None:
    batch = drawn(PROBLEM, 4_000, seed=2)
    posterior = PROBLEM.posterior(batch)[:, -1]
    of_truth = posterior.gather(1, batch.labels[:, None])
    # Under the exact posterior the truth is distributed as it says.
    assert float(of_truth.mean()) == pytest.approx(
        float(posterior.square().sum(1).mean()), abs=0.01
    )
    assert float(of_truth.mean()) > 0.6


def test_only_the_true_level_is_told_and_the_mixture_is_the_best_of_the_rest() -> None:
    errors = lab.oracle_errors(PROBLEM, n_sequences=6_000)
    assert errors.told == ("true level",) and errors.best == "Bayes mixture"
    assert errors.late("true level") < errors.late("Bayes mixture")


def test_a_level_without_noise_is_recognised() -> None:
    problem = dataclasses.replace(NoisyLinear.published(), dim=4, n_points=9)
    assert problem.sigmas == (0.0, 0.1, 0.25, 0.5, 1.0)
    batch = drawn(problem, 50, seed=0)
    posterior = problem.posterior(batch)[:, -1, 0]
    assert (posterior[batch.labels == 0] > 0.95).all()
    assert (posterior[batch.labels > 0] < 0.05).all()
    exact = problem.oracles(batch)["Bayes mixture"][:50, -1]
    torch.testing.assert_close(exact, batch.ys[:50, -1], atol=0.02, rtol=0)


def test_the_published_sizes_and_the_variance_of_outputs() -> None:
    published = NoisyLinear.published()
    assert (published.dim, published.n_points) == (20, 21)
    assert published.penalties[1:] == pytest.approx((0.2, 1.25, 5.0, 20.0))
    batch = drawn(PROBLEM, 4_000, seed=3)
    for level, sigma in enumerate(PROBLEM.sigmas):
        variance = float(batch.ys[batch.labels == level].var())
        assert variance == pytest.approx(1 + sigma**2, rel=0.06)


def test_wrong_arguments_are_named() -> None:
    for sigmas in ((), (0.1, -0.2), (0.1, 0.1)):
        with pytest.raises(ValueError, match="sigmas is .* each once, 0 or higher"):
            NoisyLinear(sigmas)
    with pytest.raises(ValueError, match="penalties is .* all positive"):
        ridge_risk([0.0], sigma=0.1, dim=2, n_shots=2)
    with pytest.raises(ValueError, match="sigma must not be negative, got -1"):
        ridge_risk([1.0], sigma=-1.0, dim=2, n_shots=2)
    with pytest.raises(ValueError, match="n_shots must be at least 1, got 0"):
        ridge_risk([1.0], sigma=1.0, dim=2, n_shots=0)
    with pytest.raises(ValueError, match="noise_variances is .* positive ones"):
        noise_mixture(torch.zeros(1, 2, 1), torch.zeros(1, 2), noise_variances=[0.0])


def test_a_linear_probe_is_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    values = [-1.0, 0.5, 2.0]

    def planted(n: int) -> Activations:
        labels = torch.randint(3, (n,), generator=generator)
        features = torch.randn(n, 2, 4, generator=generator)
        features[:, 1, 2] += torch.tensor(values)[labels]  # layer 0 holds nothing
        source = Source("planted", "resid_post", -1, "", False)
        return Activations(features, labels, ("a", "b", "c"), (0, 1), source)

    train, test = planted(400), planted(300)
    found = probe_r2(train, test, values)
    numbers = torch.tensor(values)
    for layer in (0, 1):
        model = LinearRegression().fit(train.at(layer), numbers[train.labels])
        expected = r2_score(numbers[test.labels], model.predict(test.at(layer)))
        assert found[layer] == pytest.approx(expected, abs=1e-4)
    assert found[0] < 0.05 < 0.4 < found[1]
    with pytest.raises(ValueError, match="2 numbers for 3 tasks"):
        probe_r2(train, test, [0.0, 1.0])


def test_a_swap_is_the_one_made_by_hand_and_shares_are_of_the_way(run: Run) -> None:
    model, (train, test) = run.model(), (drawn(PROBLEM, 30, seed) for seed in (0, 1))
    oracles = (
        noise_mixture(test.xs, test.ys, noise_variances=[0.01, 0.16, 1.0], weight_variance=1 / 3)
        .by_basis[:, -1]
        .T
    )
    places = (7, 9, 11)
    found = swap_distances(model, PROBLEM, train, test, oracles, places=places)
    means = {}
    for place, activations in zip(
        places, read_stream(model, PROBLEM, train, places=places), strict=True
    ):
        own = [activations.at(0)[train.labels == task].mean(0) for task in range(3)]
        means[place] = torch.stack(own).double()

    def swap(residual: torch.Tensor, hook: object) -> torch.Tensor:
        edited = residual.clone()
        for place, own in means.items():
            span = (own - own.mean(0)).T
            projector = (span @ torch.linalg.pinv(span, rtol=1e-6)).float()
            edited[:, place] += (own[2].float() - edited[:, place]) @ projector
        return edited

    tokens = PROBLEM.tokens(test)
    with torch.no_grad():
        before = model(tokens)[:, -1]
        after = model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_resid_post", swap)])[:, -1]
    rows = test.labels == 0
    expected = (after[rows] - oracles[1][rows]).square().mean()
    torch.testing.assert_close(found.distance[0, 0, 2, 1], expected, rtol=1e-3, atol=1e-5)
    way, change = (oracles[2] - oracles[0])[rows], (after - before)[rows]
    share = float((way * change).sum() / way.square().sum())
    assert found.share(0)[0] == pytest.approx(share, rel=1e-3, abs=1e-5)
    unedited = (before[rows] - oracles[0][rows]).square().mean()
    torch.testing.assert_close(found.unedited[0, 0], unedited)
    # After the last block the query's token reads from no other.
    torch.testing.assert_close(
        found.distance[1], found.unedited[:, None].expand(3, 3, 3), rtol=1e-4, atol=1e-6
    )
    assert found.moved[:, 0, :, 0].isnan().all()
    assert found.to_frame().shape == (2 * 3 * 3 * 3, 7)


def test_a_swap_needs_sequences_of_all_tasks(run: Run) -> None:
    train, test = (drawn(PROBLEM, 4, seed) for seed in (0, 1))
    few = PROBLEM.sample(4, torch.Generator(), labels=torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"train has no sequence of sigma 0\.4"):
        swap_distances(run.model(), PROBLEM, few, test, torch.zeros(3, 12))
    with pytest.raises(ValueError, match=r"oracles has shape \[2, 12\]; .* \[3, 12\]"):
        swap_distances(run.model(), PROBLEM, train, test, torch.zeros(2, 12))


def test_the_finding_measures_the_model_and_its_yardsticks(run: Run, tmp_path: Path) -> None:
    found = PROBLEM.finding(run)
    numbers = found.numbers
    assert numbers["steps"] == [0, 1, 40] == list(run.steps)
    batch = drawn(PROBLEM, 4_000, seed=5)
    with torch.no_grad():
        squares = (run.model()(batch.xs, batch.ys) - batch.ys)[:, -1].square()
    for level in range(3):
        direct = float(squares[batch.labels == level].mean())
        assert numbers["model_error"][-1][level] == pytest.approx(direct, rel=0.12)
    deviation = float(squares[batch.labels == 2].std()) / 1_000**0.5  # of a mean of squares
    assert numbers["model_error_deviation"][2] < 0.8 * deviation
    assert 1 <= numbers["mixture_to_bayes"] < 1.3 < numbers["model_to_bayes"]
    assert numbers["penalty_to_model"] < 1
    assert "A single ridge penalty is as good at all levels" in found.sentence
    assert "The Bayes lines are not reached" in found.sentence
    labels = [line.get_label() for line in found.figures["corner"].axes[0].get_lines()]
    assert {"Bayes lines", "ridge, all penalties", "exact mixture"} <= set(labels)
    assert set(found.figures) == {"corner", "decoding", "swaps"}
    found.save(tmp_path)
    assert json.loads((tmp_path / "finding.json").read_text())["swap_layer"] in (0, 1)
    plt.close("all")


def test_one_level_has_no_finding(run: Run) -> None:
    with pytest.raises(ValueError, match="needs two levels above 0"):
        NoisyLinear((0.0, 0.5)).finding(run)
