"""The library's functions on regression episodes, and what a run's checkpoints show."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
import zoo
from safetensors.torch import load_file
from typer.testing import CliRunner

import transformer_lens_taskvec as tv
from transformer_lens_taskvec import lab
from transformer_lens_taskvec.activations import Source
from transformer_lens_taskvec.cli import app
from transformer_lens_taskvec.lab.emergence import Emergence
from transformer_lens_taskvec.lab.training.on_problem import Run
from transformer_lens_taskvec.models.protocol import hook_name
from transformer_lens_taskvec.plots import save_figures
from transformer_lens_taskvec.vectors.base import TaskVectors

pytestmark = pytest.mark.model
PROBLEM = lab.SparseLinearMixture.orthogonal(2, 2, n_points=6)


@pytest.fixture(scope="module")
def model() -> lab.RegressionTransformer:
    config = lab.RegressionConfig(d_input=4, n_points=6, n_layers=2, n_heads=2, d_model=16)
    return lab.RegressionTransformer(config).eval()


@pytest.fixture(scope="module")
def run() -> Run:
    return lab.shipped_run()


@pytest.fixture(scope="module")
def found(run: Run) -> Emergence:
    return lab.measure_emergence(run, n=60, n_oracle=500, progress=False)


def episodes(n: int = 12, n_shots: int | None = None, seed: int = 0) -> list[Any]:
    return lab.problem_episodes(PROBLEM, n, n_shots, seed)


def test_an_episode_is_a_sequence_of_the_mixture() -> None:
    first, *_, last = episodes(3)
    labels = lab.balanced_labels(2, 3)
    batch = PROBLEM.sample(6, torch.Generator().manual_seed(0), labels=labels)
    assert (first.task, last.task) == ("B1", "B2")
    assert first.n_shots == 5 and first.prompt.shape == (11, 4)
    torch.testing.assert_close(last.prompt, lab.interleave(batch.xs, batch.ys)[-1])
    assert last.answer == float(batch.ys[-1, -1])
    assert episodes(1, 2)[0].prompt.shape == (5, 4)


@pytest.mark.parametrize(("n", "shots"), [(0, 2), (1, 6), (1, -1)])
def test_sizes_of_episodes_are_checked(n: int, shots: int) -> None:
    with pytest.raises(ValueError, match=r"ask for 1 episode|n_shots"):
        episodes(n, shots)


@pytest.mark.parametrize("hook", ["resid_post", "resid_pre", "attn_out", "z"])
def test_collecting_is_what_the_cache_holds(model: Any, hook: str) -> None:
    some = episodes()
    activations = tv.collect(model, some, hook=hook, position=-2, batch_size=5)
    tokens = torch.stack([episode.prompt for episode in some])
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    for layer in range(2):
        torch.testing.assert_close(
            activations.at(layer), cache[hook_name(hook, layer)][:, -2], atol=1e-6, rtol=0
        )
    assert activations.tasks == ("B1", "B2") and activations.source.bos is False


def test_scores_are_squared_errors(model: Any) -> None:
    some = episodes()
    scores = tv.evaluate(model, some)
    with torch.no_grad():
        predicted = model(torch.stack([episode.prompt for episode in some]))[:, -1]
    errors = (predicted - torch.tensor([episode.answer for episode in some])).square()
    torch.testing.assert_close(scores.loss, errors)
    assert scores.correct.tolist() == (errors.sqrt() <= 0.3).tolist()
    assert scores.loss_kind == "squared_error" and "squared error" in repr(scores)


def test_interventions_act_as_hooks_do(model: Any) -> None:
    some, vector = episodes(), torch.linspace(-1, 1, 16)
    variants = [
        [],
        [tv.inject(vector, 0, mode="add")],
        [tv.inject(vector, 1, position=3)],
        [tv.ablate(0, hook="z", head=1, position=None)],
    ]
    tokens = torch.stack([episode.prompt for episode in some])
    target = torch.tensor([episode.answer for episode in some])
    for variant, scores in zip(variants, tv.evaluate_many(model, some, variants), strict=True):
        with torch.no_grad():
            predicted = model.run_with_hooks(tokens, fwd_hooks=[tuple(hook) for hook in variant])
        torch.testing.assert_close(scores.loss, (predicted[:, -1] - target).square())
    assert all(not point.has_hooks() for point in model.hook_dict.values())


def test_vectors_sweeps_and_heads_take_problem_episodes(model: Any) -> None:
    train, test = episodes(seed=1), episodes(seed=2)
    activations = tv.collect(model, train)
    vectors = tv.task_vectors(activations)
    sweep = tv.layer_sweep(model, test, vectors)
    assert sweep.mean_loss.shape == (2, 2)
    matrix = tv.perturbation_matrix(model, test, vectors, 1)
    one = tv.evaluate(model, test, [tv.inject(vectors["B2", 1], 1)]).of("B1").mean_loss
    before = matrix.baseline.of("B1").mean_loss
    assert float(matrix.delta_loss[0, 1]) == pytest.approx(one - before, abs=1e-6)
    effects = tv.head_effects(model, train, on=test)
    assert effects.mean("loss").shape == (2, 2)
    with pytest.raises(KeyError, match="no effects on 'probability'"):
        _ = effects.probability
    with pytest.raises(ValueError, match="answers are numbers"):
        tv.evaluate(model, test, metrics=["probability"])
    pruned = tv.head_effects(model, train, on=test, ablation="zero", position=None)
    whole = tv.evaluate(model, test, [tv.ablate(1, hook="z", head=0, position=None)])
    change = whole.of("B1").mean_loss - pruned.baseline.of("B1").mean_loss
    assert float(pruned.by_task["loss"][0, 1, 0]) == pytest.approx(change, abs=1e-5)
    assert tv.task_decodability(activations).scores.shape == (2, 2)
    for ax in (tv.plot_head_effects(pruned, task="B2"), tv.plot_perturbation(matrix)):
        plt.close(ax.figure)


def test_texts_and_vectors_do_not_mix(model: Any) -> None:
    text = tv.sample_episodes(tv.bitwise_tasks(), 1, 1, seed=0)
    with pytest.raises(ValueError, match="cannot be mixed with texts"):
        tv.collect(model, [*episodes(1), *text])
    with pytest.raises(ValueError, match="BOS"):
        tv.evaluate(model, zoo.with_bos(episodes(1), True))


def test_a_swap_in_a_subspace_keeps_the_rest() -> None:
    values = torch.randn(3, 1, 8, generator=torch.Generator().manual_seed(0))
    source = Source("m", "resid_post", -1, "t", False)
    vectors = TaskVectors(values, ("a", "b", "c"), (4,), source)
    swap = vectors.subspace(4)
    assert swap.directions.shape == (2, 8)
    rows = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    swapped = swap(rows, vectors["b", 4])
    along = swap.directions.T
    torch.testing.assert_close(swapped @ along, (vectors["b", 4] @ along).expand(5, -1))
    rest = torch.eye(8) - along @ along.T
    torch.testing.assert_close(swapped @ rest, rows @ rest)
    # Between the tasks' own means it is the whole of the difference.
    torch.testing.assert_close(swap(values[:1, 0], values[1, 0]), values[1:2, 0])


def test_tasks_separate_as_the_error_falls(found: Emergence) -> None:
    late, td = found.late_loss.mean(-1), found.td[:, found.best_layer()].mean(-1)
    assert td[0] < 0.35 and td[-1] >= 0.95
    assert (found.late_loss[0] > 30 * found.late_loss[-1]).all()
    # Better than those that do not infer the basis, though LASSO has 8 to 15 pairs for 2 weights.
    assert late[-1] < 0.5 * found.oracles.late("ridge")
    assert late[-1] < found.oracles.late("lasso")
    assert late[-1] < 2.5 * found.oracles.late("Bayes mixture")
    assert found.td_loss_correlation <= -0.8


def test_swaps_do_harm_once_tasks_are_apart(found: Emergence) -> None:
    own = torch.eye(4, dtype=torch.bool)
    early, late = found.swap_ratio[1], found.swap_ratio[-1]
    assert late[own].mean() < 1.5 and (late[~own] > 3).all()
    assert early.max() < 1.5


def test_predictions_end_nearest_to_bayes(found: Emergence) -> None:
    at = dict(zip(found.oracles.names, found.oracle_distance[-1].tolist(), strict=True))
    assert min(at, key=at.__getitem__) in ("Bayes mixture", "true basis")


def test_emergence_is_recorded_and_drawn(found: Emergence, run: Run, tmp_path: Path) -> None:
    frame = found.to_frame()
    assert len(frame) == 4 * len(run.steps)
    assert frame.td.iloc[-1] == pytest.approx(float(found.td[-1, found.best_layer(), -1]))
    saved = json.loads(found.save(tmp_path).read_text())
    assert saved["tasks"] == ["B1", "B2", "B3", "B4"] and len(saved["checkpoints"]) == len(frame)
    figures = lab.emergence_figures(run, found, n=30)
    assert set(figures) >= {"training", "oracles", "embedding", "swaps", "head_pruning"}
    paths = save_figures(figures, tmp_path / "figures")
    assert all(path.stat().st_size > 5_000 for path in paths) and not plt.get_fignums()
    with pytest.raises(ValueError, match="no checkpoint at step 5"):
        tv.lab.plot_oracles(found, [5])


def test_the_posterior_is_held_against_neighbours(run: Run) -> None:
    few = lab.posterior_agreement(run, 3, n=60)
    many = lab.posterior_agreement(run, 12, n=60)
    assert few.posterior.mean() < many.posterior.mean()
    assert few.correlation > 0.3 and many.neighbours.mean() > 0.9
    other = lab.RegressionFamilies(dim=8, n_points=16)
    with pytest.raises(ValueError, match="RegressionFamilies has no exact posterior"):
        lab.posterior_agreement(dataclasses.replace(run, config=_with(run, other)), 3)


def _with(run: Run, problem: Any) -> Any:
    return dataclasses.replace(run.config, problem=problem)


def test_commands_train_and_show(tmp_path: Path) -> None:
    runner, out = CliRunner(), tmp_path / "run"
    trained = runner.invoke(app, ["train", "--steps", "4", "--out", str(out), "--device", "cpu"])
    assert trained.exit_code == 0, trained.output
    shown = runner.invoke(app, ["emergence", str(out), "--n", "12", "--out", str(out)])
    assert shown.exit_code == 0, shown.output
    assert (out / "emergence.json").exists() and (out / "training.png").exists()
    missing = runner.invoke(app, ["emergence", str(tmp_path / "none")])
    assert missing.exit_code == 2 and "no run" in missing.output


def test_some_checkpoints_are_exported(tmp_path: Path, run: Run) -> None:
    small = run.export(tmp_path / "some", run.steps[-2:])
    assert small.steps == run.steps[-2:]
    file = next((tmp_path / "some" / "checkpoints").iterdir())
    assert all(value.dtype == torch.float16 for value in load_file(file).values())
    batch = run.config.problem.sample(20, torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = (r.model()(batch.xs, batch.ys) for r in (run, small))
    torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match="already holds"):
        run.export(tmp_path / "some", run.steps[-1:])
    with pytest.raises(ValueError, match="no checkpoint at step 3"):
        run.export(tmp_path / "other", [3])
