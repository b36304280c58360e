"""Regression on a representation: against scikit-learn, scipy, numpy and planted models."""

from __future__ import annotations

import dataclasses
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.linear_model import Ridge
from torch import nn
from transformer_lens.hook_points import HookPoint

import transformer_lens_taskvec as tv
from transformer_lens_taskvec import lab
from transformer_lens_taskvec.lab.problems.represented import finding
from transformer_lens_taskvec.lab.problems.represented.finding import decodability
from transformer_lens_taskvec.lab.problems.represented.pasting import (
    AffineEmbedding,
    LinearVectors,
    paste_upper,
)
from transformer_lens_taskvec.lab.problems.represented.probes import probe_targets
from transformer_lens_taskvec.lab.problems.represented.problem import Represented

pytestmark = pytest.mark.usefixtures("one_thread")

THREE = Represented(dim=4, n_points=10)
ONE = Represented.single(dim=4, n_points=6)


def draw(problem: lab.Problem, n: int, seed: int = 0) -> lab.Batch:
    return problem.sample(n, torch.Generator().manual_seed(seed))


def model_of(problem: lab.Problem, n_layers: int = 2) -> lab.RegressionTransformer:
    size = lab.RegressionConfig(n_layers=n_layers, n_heads=2, d_model=16, init="fan_in")
    return problem.make_model(size, seed=0, device="cpu")


@pytest.mark.parametrize("n_layers", [1, 2, 3, 4])
def test_a_map_is_orthogonal_layers_with_leaky_relus(n_layers: int) -> None:
    problem = Represented(n_layers, n_maps=2, dim=5)
    matrices = problem.matrices.double().numpy()
    assert matrices.shape == (2, n_layers, 5, 5)
    xs = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(1))
    found = problem.represent(xs).numpy()
    for k in range(2):
        hidden = xs.double().numpy()
        for matrix in matrices[k]:
            np.testing.assert_allclose(matrix @ matrix.T, np.eye(5), atol=1e-6)
            hidden = hidden @ matrix.T
            hidden = np.where(hidden > 0, hidden, 0.01 * hidden)
        np.testing.assert_allclose(found[:, :, k], hidden, atol=1e-5)
    assert not np.allclose(matrices[0], matrices[1])
    assert not torch.equal(problem.matrices, Represented(n_layers, 2, 5, map_seed=1).matrices)


def test_outputs_are_linear_in_the_sequences_own_map() -> None:
    problem = Represented(dim=4, noise_variance=0.0, weight_variance=2.0)
    batch = draw(problem, 900)
    phi = problem.represent(batch.xs)
    own = phi[torch.arange(900), :, batch.labels]
    weights = torch.linalg.lstsq(own.double(), batch.ys.double()[..., None]).solution[..., 0]
    torch.testing.assert_close(torch.einsum("bpd,bd->bp", own.double(), weights).float(), batch.ys)
    assert float(weights.var()) == pytest.approx(2.0, rel=0.1)
    noisy = draw(dataclasses.replace(problem, noise_variance=0.3), 900)
    assert float((noisy.ys - batch.ys).var()) == pytest.approx(0.3, rel=0.05)


def test_its_ridges_are_scikit_learns() -> None:
    problem = dataclasses.replace(THREE, noise_variance=0.04, weight_variance=0.5)
    batch = draw(problem, 4)
    found = problem.oracles(batch)
    every = problem.represent(batch.xs)
    best = problem._raw_penalty
    for row in range(4):
        for name, inputs, penalty in (
            ("ridge on Phi(x)", every[row, :, batch.labels[row]], 0.08),
            ("ridge on all maps", every[row].flatten(1), 0.24),
            ("ridge on x", batch.xs[row], best),
        ):
            x, y = inputs.double().numpy(), batch.ys[row].double().numpy()
            for point in range(1, problem.n_points):
                fit = Ridge(alpha=penalty, fit_intercept=False).fit(x[:point], y[:point])
                expected = fit.predict(x[point : point + 1])[0]
                assert float(found[name][row, point]) == pytest.approx(expected, abs=2e-5)


def test_every_map_and_ridge_on_it_are_targets() -> None:
    batch = draw(THREE, 5)
    targets = THREE.targets(batch)
    for k in range(3):
        of_k = lab.Batch(batch.xs, batch.ys, torch.full((5,), k))
        expected = THREE.oracles(of_k)["ridge on Phi(x)"]
        torch.testing.assert_close(targets["every map's ridge"][..., k], expected)
        phi = targets["every map's Phi(x)"][..., 4 * k : 4 * k + 4]
        torch.testing.assert_close(phi, THREE.own(of_k))


def test_the_penalty_of_ridge_on_x_is_the_best_of_those_tried() -> None:
    batch = draw(THREE, 2_000, seed=5)
    late = {
        penalty: float((lab.ridge(batch.xs, batch.ys, penalty=penalty) - batch.ys)[:, 5:].var())
        for penalty in (0.01, THREE._raw_penalty, 256.0)
    }
    assert min(late, key=lambda penalty: late[penalty]) == THREE._raw_penalty


def test_the_mixture_weights_maps_by_their_evidence() -> None:
    problem = dataclasses.replace(THREE, noise_variance=0.04, weight_variance=0.5)
    batch = draw(problem, 5)
    phi = problem.represent(batch.xs).double().numpy()
    ys = batch.ys.double().numpy()
    each = problem.by_task(batch).predictions
    torch.testing.assert_close(each, problem.targets(batch)["every map's ridge"])
    found = problem.posterior(batch)
    mixture = problem.oracles(batch)["Bayes mixture"]
    torch.testing.assert_close(found[:, 0], torch.full((5, 3), 1 / 3))
    for row in range(5):
        for point in (1, 3, 9):
            seen, y = phi[row, :point], ys[row, :point]
            evidence, predicted = [], []
            for k in range(3):
                covariance = 0.5 * seen[:, k] @ seen[:, k].T + 0.04 * np.eye(point)
                evidence.append(multivariate_normal(cov=covariance).logpdf(y))
                across = 0.5 * seen[:, k] @ phi[row, point, k]
                predicted.append(across @ np.linalg.solve(covariance, y))
            weights = np.exp(evidence - np.logaddexp.reduce(evidence))
            np.testing.assert_allclose(found[row, point], weights, atol=1e-4)
            assert float(mixture[row, point]) == pytest.approx(weights @ predicted, abs=1e-4)


def test_oracles_are_ordered_and_only_the_true_map_is_told() -> None:
    errors = lab.oracle_errors(Represented(), n_sequences=1_500)
    late = [errors.late(name) for name in ("Bayes mixture", "ridge on all maps", "ridge on x")]
    assert errors.told == ("ridge on Phi(x)",) and errors.best == "Bayes mixture"
    assert errors.late("ridge on Phi(x)") < late[0] < late[1] < late[2]
    assert late[0] < 1.2 * errors.late("ridge on Phi(x)")
    single = lab.oracle_errors(ONE, n_sequences=200)
    assert single.names == ("ridge on x", "ridge on Phi(x)") and not single.told
    silent = dataclasses.replace(THREE, noise_variance=0.0)
    assert "Bayes mixture" not in silent.oracles(draw(silent, 3))
    with pytest.raises(ValueError, match="noise_variance is 0"):
        silent.posterior(draw(silent, 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_layers_of_phi": 5}, "n_layers_of_phi must be in [1, 4], got 5"),
        ({"n_maps": 0}, "n_maps must be at least 1, got 0"),
        ({"weight_variance": 0.0}, "weight_variance must be positive, got 0.0"),
        ({"noise_variance": -1.0}, "noise_variance must not be negative"),
        ({"n_points": 1}, "n_points must be at least 2"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Represented(**settings)


def test_a_probe_is_scikit_learns_ridge() -> None:
    model = model_of(THREE)
    found = probe_targets(model, THREE, n=30, penalty=0.01, seed=3)
    labels = lab.balanced_labels(3, 30)
    generator = torch.Generator().manual_seed(3)
    train, test = (THREE.sample(90, generator, labels=labels) for _ in range(2))
    for kind, offset, points in (("x", 0, range(5, 10)), ("y", 1, range(5, 9))):
        at = [2 * point + offset for point in points]
        for stage, hook in enumerate(("blocks.0.hook_resid_pre", "blocks.0.hook_resid_post")):
            read, unseen = (
                model.run_with_cache(THREE.tokens(batch))[1][hook][:, at].flatten(0, 1).double()
                for batch in (train, test)
            )
            penalty = 0.01 * float((read - read.mean(0)).square().sum(0).mean())
            for target in ("Phi(x)", "y", "every map's Phi(x)"):
                goal, truth = (
                    THREE.targets(batch)[target][:, list(points)].flatten(0, 1).double().numpy()
                    for batch in (train, test)
                )
                probe = Ridge(alpha=penalty).fit(read.detach().numpy(), goal)
                missed = truth - probe.predict(unseen.detach().numpy())
                expected = (missed**2).sum() / ((truth - truth.mean(0)) ** 2).sum()
                assert float(found.of(target, kind)[stage]) == pytest.approx(expected, rel=1e-3)


def test_probes_find_what_the_embedding_holds_and_only_that() -> None:
    found = probe_targets(model_of(THREE), THREE, n=300)
    assert found.of("x", "x")[0] < 1e-4 and found.of("y", "y")[0] < 1e-4
    for target, kind in (("x", "y"), ("y", "x"), ("prediction", "x")):
        assert found.of(target, kind)[0] > 0.9
    assert found.best_layer("y", "y") in (-1, 0) and found.points == (5, 10)
    assert (found.shuffled[:, :, 1] > 0.95).all()
    frame = found.to_frame()
    assert len(frame) == 2 * 3 * 6
    row = frame[(frame.token == "y") & (frame.layer == 1) & (frame.target == "Phi(x)")].iloc[0]
    assert row.error == pytest.approx(float(found.of("Phi(x)", "y")[2]))
    assert row.untrained == pytest.approx(row.error - float(-found.gain("Phi(x)", "y")[2]))


class Rectifies(nn.Module):
    """A planted block: writes ``relu`` of the first coordinate to the last."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_resid_pre, self.hook_resid_post = HookPoint(), HookPoint()

    def forward(self, residual: torch.Tensor) -> torch.Tensor:
        residual = self.hook_resid_pre(residual).clone()
        residual[..., -1] = torch.relu(residual[..., 0])
        after: torch.Tensor = self.hook_resid_post(residual)
        return after


class Correlates(Rectifies):
    """A planted block: at each x token, the mean of ``y_j <u_j, u>`` over the y tokens before it.

    It reads u at the coordinates 0 to 3 of x tokens and 4 to 7 of y tokens, and y at 8, and writes
    to 9.
    """

    def forward(self, residual: torch.Tensor) -> torch.Tensor:
        queries, pairs = residual[:, ::2, :4], residual[:, 1::2]
        votes = torch.einsum("bqd,bjd,bj->bqj", queries, pairs[..., 4:8], pairs[..., 8]).tril(-1)
        counts = torch.arange(votes.shape[1]).clamp(min=1)
        added = torch.zeros_like(residual)
        added[:, ::2, 9] = votes.sum(-1) / counts
        return residual + added


def planted(block: nn.Module) -> lab.RegressionTransformer:
    """A model that reads x as it is, with this block as its second."""
    model = model_of(THREE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.read_in.weight[:4] = torch.eye(4)
        model.read_out.weight[0, 9] = 1.0
    model.blocks[1], model.ln_final = block, nn.Identity()
    model.setup()
    return model


def test_a_nonlinear_target_is_found_from_the_layer_that_computes_it() -> None:
    def rectified(batch: lab.Batch) -> dict[str, torch.Tensor]:
        return {"relu": torch.relu(batch.xs[..., 0])}

    found = probe_targets(planted(Rectifies()), THREE, targets=rectified, n=100)
    assert found.best_layer("relu", "x") == 1 and found.of("relu", "x")[2] < 1e-3
    assert found.of("relu", "x")[:2].min() > 0.2 and found.gain("relu", "x")[2] > 0.1
    assert found.of("relu", "y").min() > 0.9


def test_probes_say_what_is_wrong() -> None:
    model = model_of(THREE)
    with pytest.raises(ValueError, match="n is 0; ask for 1"):
        probe_targets(model, THREE, n=0)
    with pytest.raises(ValueError, match="penalty must be positive, got 0"):
        probe_targets(model, THREE, penalty=0.0)
    with pytest.raises(ValueError, match="LinearVectors has no targets of its own; give targets="):
        probe_targets(model, LinearVectors(4))
    with pytest.raises(ValueError, match=r"target 'label' has shape \(6,\); expected"):
        probe_targets(model, THREE, n=2, targets=lambda batch: {"label": batch.labels})
    with pytest.raises(ValueError, match="no target 'z' here; there are: x, Phi"):
        probe_targets(model, THREE, n=5).of("z", "x")


def test_linear_vectors_have_the_second_moments_of_the_representation() -> None:
    linear = Represented(1, n_maps=1).linear_vectors()
    # Of one layer: E[r r'] = B' (I s + 11' m^2) B for coordinates of variance s and mean m.
    mean, square = 0.99 / np.sqrt(2 * np.pi), (1 + 0.01**2) / 2
    expected = [square + 5 * mean**2, *[square - mean**2] * 5]
    assert linear.variances == pytest.approx(expected, rel=0.08)
    assert (linear.dim, linear.n_points, linear.noise_variance) == (6, 16, 0.01)
    uneven = LinearVectors(3, (4.0, 1.0, 0.25), 0.01, 2.0)
    drawn = draw(uneven, 3_000)
    assert drawn.xs.square().mean((0, 1)).tolist() == pytest.approx([4.0, 1.0, 0.25], rel=0.05)
    errors = lab.oracle_errors(uneven, n_sequences=3_000)
    assert errors.late("zero") == pytest.approx(5.25 * 2.0 + 0.01, rel=0.05)
    assert errors.best == "ridge" and errors.late("ridge") < 0.03
    with pytest.raises(ValueError, match=r"variances must be 3 positive numbers, got \(1.0, 2.0\)"):
        LinearVectors(3, (1.0, 2.0))
    with pytest.raises(ValueError, match="weight_variance must be positive, got 0"):
        LinearVectors(3, weight_variance=0.0)


def test_pasting_leaves_out_the_lower_blocks_and_leaves_the_model_alone() -> None:
    model, linear = model_of(ONE, n_layers=3), ONE.linear_vectors()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = paste_upper(model, 0, linear, steps=2, batch_size=4, n=40, seed=5)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    batch = linear.sample(40, torch.Generator().manual_seed(3_000_001 + 5))
    kept: dict[str, torch.Tensor] = {}

    def keep(residual: torch.Tensor, hook: Any) -> None:
        kept["embedded"] = residual

    def put(residual: torch.Tensor, hook: Any) -> torch.Tensor:
        return kept["embedded"]

    hooks = [("blocks.0.hook_resid_pre", keep), ("blocks.1.hook_resid_pre", put)]
    predicted = model.run_with_hooks(linear.tokens(batch), fwd_hooks=hooks)
    expected = (predicted - batch.ys).square().mean(0)
    torch.testing.assert_close(found.loss[found.names.index("no lower module")], expected)


def test_the_embedding_is_affine_in_each_token() -> None:
    embed = AffineEmbedding(4, 11, 8, seed=1)
    xs, ys = torch.randn(2, 6, 4), torch.randn(2, 6)
    found = embed(xs, ys)
    torch.testing.assert_close(found[:, 4], xs[:, 2] @ embed.at_x.T + embed.bias[4])
    pair = torch.cat([xs[:, 2], ys[:, 2, None]], 1)
    torch.testing.assert_close(found[:, 5], pair @ embed.at_y.T + embed.bias[5])


def test_an_embedding_is_trained_for_an_upper_module_that_regresses() -> None:
    linear = LinearVectors(4, n_points=10)
    found = paste_upper(planted(Correlates()), 0, linear, steps=300, learning_rate=0.02)
    assert found.late("pasted") < 0.6 * found.late("zero")
    for control in ("shuffled weights", "no lower module"):
        assert found.late(control) > 0.9 * found.late("zero")


def test_pasting_says_what_is_wrong() -> None:
    model = model_of(ONE)
    with pytest.raises(ValueError, match=r"layer must be in \[0, 0\], .* 2 layers; got 1"):
        paste_upper(model, 1, ONE.linear_vectors())
    with pytest.raises(ValueError, match="on has 16 points of 6 dimensions; the model takes"):
        paste_upper(model, 0, LinearVectors())
    with pytest.raises(ValueError, match="steps, batch_size and n must be 1 or more"):
        paste_upper(model, 0, ONE.linear_vectors(), steps=0)


@pytest.mark.parametrize("problem", [ONE, Represented(1, 2, 4, n_points=6)])
def test_a_short_run_is_measured_and_drawn(
    problem: Represented, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_steps = partial(paste_upper, steps=5, n=50)
    monkeypatch.setattr(finding, "paste_upper", few_steps)
    tiny = {"n_layers": 2, "n_heads": 2, "d_model": 8, "steps": 30, "batch_size": 8}
    few = {"n_checkpoints": 2, "n_eval": 10, "warmup": 3}
    config = lab.TrainConfig(problem=problem, **{**problem.defaults, **tiny, **few})
    run = lab.train(config, tmp_path / "run", progress=False, device="cpu")
    assert lab.load_run(tmp_path / "run").config.problem == problem
    found = run.config.problem.finding(run)
    several = problem.n_maps > 1
    assert sorted(found.figures) == ["decodability"] * several + ["errors", "pasting", "probes"]
    assert "The late error is" in found.sentence and "order of the paper" in found.sentence
    assert ("The map can be decoded" in found.sentence) == several
    late = lab.evaluate_problem(run.model(), problem, n_eval=500).loss[:, 3:].mean()
    assert found.numbers["late error: model"] == pytest.approx(float(late), rel=0.15)
    found.save(tmp_path / "figures")
    assert json.loads((tmp_path / "figures" / "finding.json").read_text())["step"] == 30
    if several:
        emergence = lab.measure_emergence(run, steps=[30], n=12, n_oracle=50, progress=False)
        assert emergence.tasks == ("Phi1", "Phi2")
        assert problem.swapped_at(5) == (10,)  # the query after five pairs
        td = decodability(run.model(), problem)
        assert td.shape == (2, 3) and (td[0, 0] - 0.5).abs() < 0.2
        episodes = lab.problem_episodes(problem, 20)
        assert tv.task_decodability(tv.collect(run.model(), episodes)).scores.shape == (2, 2)
