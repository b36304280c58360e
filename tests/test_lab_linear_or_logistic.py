"""Linear or logistic: the oracle against scikit-learn, what counts, and the finding."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import transformer_lens_taskvec as tv
from transformer_lens_taskvec import lab
from transformer_lens_taskvec.lab.problems.linear_or_logistic import (
    LinearOrLogistic,
    logistic_regression,
)
from transformer_lens_taskvec.lab.problems.readings import drawn
from transformer_lens_taskvec.lab.training.on_problem import Run

pytestmark = pytest.mark.usefixtures("one_thread")

PROBLEM = LinearOrLogistic()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = lab.TrainConfig(
        problem=PROBLEM,
        **{
            **PROBLEM.defaults,
            "n_layers": 2,
            "n_heads": 2,
            "d_model": 16,
            "steps": 60,
            "batch_size": 16,
            "n_checkpoints": 2,
            "n_eval": 10,
        },
    )
    trained: Run = lab.train(config, tmp_path_factory.mktemp("kinds"), progress=False, device="cpu")
    return trained


@pytest.mark.parametrize("penalty", [0.01, 0.1, 2.0])
def test_logistic_regression_is_scikit_learns(penalty: float) -> None:
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(4, 12, 3, generator=generator)
    noisy = xs.sum(-1) + 1.5 * torch.randn(4, 12, generator=generator)
    ys = torch.where(torch.arange(4)[:, None] < 2, xs.sum(-1), noisy)  # two can be separated
    found = logistic_regression(xs, ys, penalty=penalty)
    assert (found[:, 0] == 0).all()
    for row in range(4):
        x, y = xs[row].double().numpy(), np.sign(ys[row].double().numpy())
        for point in range(1, 12):
            if len(set(y[:point])) < 2:
                continue  # scikit-learn takes two classes only
            model = LogisticRegression(C=1 / penalty, fit_intercept=False, tol=1e-12, max_iter=5000)
            expected = model.fit(x[:point], y[:point]).decision_function(x[point : point + 1])[0]
            assert float(found[row, point]) == pytest.approx(expected, abs=2e-3)


def test_it_is_stationary_where_there_is_one_class_only() -> None:
    xs = torch.tensor([[[2.0], [1.0]]])
    logit = float(logistic_regression(xs, torch.ones(1, 2), penalty=0.5)[0, 1])
    # One pair x = 2, y = 1: the slope 0.5 w - 2 sigmoid(-2 w) is zero.
    assert 0.5 * logit == pytest.approx(2 / (1 + math.exp(2 * logit)), abs=1e-5)


def test_the_kinds_have_their_outputs_and_losses() -> None:
    batch = drawn(PROBLEM, 500, seed=0)
    classes = batch.ys[batch.labels == 1]
    assert (classes.abs() == 1).all() and abs(float(classes.mean())) < 0.05
    assert float(batch.ys[batch.labels == 0].var()) == pytest.approx(1.01, rel=0.1)
    predictions, targets = torch.tensor([[0.5, 2.0]]), torch.tensor([[1.0, -1.0]])
    kinds = torch.tensor([[0], [1]])
    losses = PROBLEM.losses(predictions.expand(2, 2), targets.expand(2, 2), kinds)
    expected = [[0.25, 9.0], [math.log(1 + math.exp(-0.5)), math.log(1 + math.exp(2.0))]]
    torch.testing.assert_close(losses, torch.tensor(expected))
    right = PROBLEM.right(predictions.expand(2, 2), targets.expand(2, 2), kinds)
    assert right.tolist() == [[False, False], [True, False]]


def test_one_output_gives_the_kind_away() -> None:
    batch = drawn(PROBLEM, 20, seed=1)
    posterior = PROBLEM.posterior(batch)
    assert (posterior[:, 0] == 0.5).all()
    truth = batch.labels[:, None, None].expand(-1, PROBLEM.n_points, -1)
    assert (posterior.gather(2, truth)[:, 1:] == 1).all()


def test_each_kind_has_its_best_oracle() -> None:
    errors = lab.oracle_errors(PROBLEM, n_sequences=2_000)
    assert errors.told == ("told the kind",) and errors.best == "inferred kind"
    assert errors.late("inferred kind") == pytest.approx(errors.late("told the kind"))
    assert errors.late("inferred kind") < min(
        errors.late("least squares"), errors.late("logistic regression")
    )
    published = LinearOrLogistic.published()
    assert (published.dim, published.n_points, published.noise_variance) == (20, 41, 0.0)
    labels = torch.zeros(3, dtype=torch.long)
    exact = published.sample(3, torch.Generator().manual_seed(0), labels=labels)
    squares = published.oracles(exact)["told the kind"]
    torch.testing.assert_close(squares[:, 25:], exact.ys[:, 25:], atol=1e-2, rtol=0)


def test_the_penalty_is_about_the_best_for_logits_and_matters_little_for_classes() -> None:
    labels = torch.ones(1_500, dtype=torch.long)
    batch = PROBLEM.sample(1_500, torch.Generator().manual_seed(0), labels=labels)
    late, accuracy = {}, {}
    for penalty in (0.01, PROBLEM.logistic_penalty, 1.0):
        logits = logistic_regression(batch.xs, batch.ys, penalty=penalty)
        late[penalty] = float(PROBLEM.losses(logits, batch.ys, labels[:, None])[:, 5:].mean())
        accuracy[penalty] = float(
            PROBLEM.right(logits, batch.ys, labels[:, None])[:, 5:].float().mean()
        )
    assert min(late, key=lambda penalty: late[penalty]) == PROBLEM.logistic_penalty
    assert max(accuracy.values()) - min(accuracy.values()) < 0.03


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="logistic_penalty must be positive, got 0; separable"):
        LinearOrLogistic(logistic_penalty=0)
    with pytest.raises(ValueError, match="penalty must be positive, got -1"):
        logistic_regression(torch.zeros(1, 2, 1), torch.zeros(1, 2), penalty=-1)
    with pytest.raises(RuntimeError, match="did not converge"):
        logistic_regression(torch.full((1, 3, 1), torch.nan), torch.ones(1, 3))


def test_the_finding_measures_the_model_and_its_yardsticks(run: Run) -> None:
    found = PROBLEM.finding(run)
    numbers = found.numbers
    batch = drawn(PROBLEM, 1_500, seed=7)
    with torch.no_grad():
        predictions = run.model()(batch.xs, batch.ys)[:, -1]
    regressions, classes = batch.labels == 0, batch.labels == 1
    squares = (predictions - batch.ys[:, -1])[regressions].square().mean()
    assert numbers["model_error"][-1] == pytest.approx(float(squares), rel=0.2)
    share = (predictions.sign() == batch.ys[:, -1])[classes].float().mean()
    assert numbers["model_accuracy"][-1] == pytest.approx(float(share), abs=0.06)
    assert numbers["least squares error"] < 0.03 < numbers["logistic regression error"]
    assert numbers["logistic regression accuracy"] > 0.85
    assert numbers["logistic regression logistic_loss"] < numbers["least squares logistic_loss"]
    labels = [line.get_label() for line in found.figures["corner"].axes[0].get_lines()]
    assert {"least squares", "logistic regression", "model, last step"} <= set(labels)
    assert f"{numbers['model_error'][-1]:.4f} (least squares" in found.sentence
    plt.close("all")


def test_the_library_measures_it_like_any_other(run: Run) -> None:
    found = lab.measure_emergence(run, n=12, n_oracle=100, progress=False)
    assert found.loss_kind == "loss" and found.oracles.best == "inferred kind"
    assert found.swap_ratio.shape == (len(run.steps), 2, 2)
    episodes = lab.problem_episodes(PROBLEM, 12, seed=0)
    decodability = tv.task_decodability(tv.collect(run.model(), episodes))
    assert decodability.tasks == ("regression", "classification")
    scores = tv.evaluate(run.model(), episodes)
    losses = [
        float(episode.losses(run.model()(episode.prompt[None])[:, -1].detach()))
        for episode in episodes
    ]
    torch.testing.assert_close(scores.loss.double(), torch.tensor(losses).double())
    assert lab.load_run(run.path).config.problem == PROBLEM
