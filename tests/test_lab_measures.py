"""The gap to Bayesian averaging, answers from the vector alone, and norms, against other ways."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from scipy.stats import entropy, norm, spearmanr
from torch import Tensor, nn

from transformer_lens_taskvec import lab
from transformer_lens_taskvec.lab.averaging import _best_fixed, _exact, bma_gap
from transformer_lens_taskvec.lab.averaging_figures import plot_bma_gap
from transformer_lens_taskvec.lab.averaging_fits import simplex_weights
from transformer_lens_taskvec.lab.norms import NormsAndError, norms_and_error, plot_norms
from transformer_lens_taskvec.lab.problems.base import TaskPredictions
from transformer_lens_taskvec.lab.training import loop
from transformer_lens_taskvec.lab.training.on_problem import Run
from transformer_lens_taskvec.lab.training.vector_loss import VectorLoss, answers_from_vectors
from transformer_lens_taskvec.lab.vector_errors import plot_vector_errors, vector_error_by_layer

pytestmark = pytest.mark.usefixtures("one_thread")

PROBLEM = lab.SparseLinearMixture(dim=3, bases=((0,), (1, 2)), n_points=6)
CONFIG = dataclasses.replace(
    lab.PRESETS["small"],
    problem=PROBLEM,
    n_layers=2,
    n_heads=2,
    d_model=16,
    steps=30,
    batch_size=16,
    warmup=5,
    n_checkpoints=3,
    n_eval=20,
    vector_loss=VectorLoss(0, 0.5),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    trained: Run = lab.train(CONFIG, tmp_path_factory.mktemp("own"), progress=False, device="cpu")
    return trained


def draw(problem: lab.Problem, n: int, seed: int = 0) -> lab.Batch:
    return problem.sample(n, torch.Generator().manual_seed(seed))


# --- Bayesian averaging ------------------------------------------------------------------------


def test_the_variance_given_a_task_is_that_of_the_gaussian_process() -> None:
    batch, noise = draw(PROBLEM, 3), PROBLEM.noise_variance
    found = PROBLEM.by_task(batch)
    assert found.variances is not None
    for row in range(3):
        for task, basis in enumerate(PROBLEM.bases):
            x = batch.xs[row, :, list(basis)].double().numpy()
            y = batch.ys[row].double().numpy()
            kernel = x @ x.T + noise * np.eye(len(x))
            for t in range(PROBLEM.n_points):
                gain = kernel[t, :t] @ np.linalg.inv(kernel[:t, :t]) if t else np.zeros(0)
                expected = kernel[t, t] - gain @ kernel[:t, t]
                np.testing.assert_allclose(found.variances[row, t, task], expected, rtol=1e-4)
                mean = found.predictions[row, t, task]
                np.testing.assert_allclose(mean, gain @ y[:t], atol=1e-4)


@dataclass(frozen=True)
class Dice(lab.TokenProblem):
    """Throws of one of three dice; the next throw is to be predicted."""

    tasks: tuple[str, ...] = ("fair", "low", "high")
    n_points: int = 7
    d_vocab: int = 4
    n_tokens: int = 8

    @property
    def dice(self) -> Tensor:
        return torch.tensor([[1, 1, 1, 1], [5, 3, 1, 1], [1, 1, 2, 6]]) / torch.tensor(
            [[4], [10], [10]]
        )

    def query_at(self, point: int) -> int:
        return point

    def sample(
        self, batch_size: int, generator: torch.Generator, *, labels: Any = None
    ) -> lab.Batch:
        if labels is None:
            labels = torch.randint(3, (batch_size,), generator=generator)
        throws = torch.multinomial(self.dice[labels], 8, replacement=True, generator=generator)
        return lab.Batch(throws, throws[:, 1:], labels)

    def posterior(self, batch: lab.Batch) -> Tensor:
        # The first throw is no output, so that nothing is known at the first point.
        logp = self.dice.log()[:, batch.ys].permute(1, 2, 0).cumsum(1)
        return torch.cat([torch.zeros_like(logp[:, :1]), logp[:, :-1]], dim=1).softmax(-1)

    def by_task(self, batch: lab.Batch) -> TaskPredictions:
        return TaskPredictions(self.dice.log().expand(*batch.ys.shape, -1, -1))


PROBLEMS: list[lab.Problem] = [PROBLEM, Dice()]


@pytest.mark.parametrize("problem", PROBLEMS, ids=["regression", "dice"])
def test_the_posterior_is_the_product_of_the_tasks_predictions(problem: lab.Problem) -> None:
    exact = _exact(problem, draw(problem, 40))
    total = exact.task_density.cumsum(1)[:, :-1]
    torch.testing.assert_close(total.softmax(-1), exact.posterior[:, 1:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("problem", PROBLEMS, ids=["regression", "dice"])
def test_the_exact_mixture_respects_the_bound_on_every_sequence(problem: lab.Problem) -> None:
    exact = _exact(problem, draw(problem, 500))
    best, prior = _best_fixed(exact, torch.ones_like(exact.density))
    regret = best - exact.density.cumsum(1)
    torch.testing.assert_close(-prior, torch.full_like(prior, np.log(len(problem.tasks))))
    assert (regret <= -prior + 1e-4).all() and regret[:, -1].max() > 0.9 * -prior[0, 0]


def test_weights_on_the_simplex_are_the_best_of_a_grid() -> None:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(6, 1, 5, 3, generator=generator).double()
    wanted = torch.randn(6, 1, 5, generator=generator).double()
    found = simplex_weights(rows, wanted)
    torch.testing.assert_close(found.sum(-1), torch.ones(6, 1).double())
    steps = torch.linspace(0, 1, 101).double()
    grid = torch.cartesian_prod(steps, steps)
    grid = torch.cat([grid, 1 - grid.sum(1, keepdim=True)], dim=1)
    grid = grid[grid[:, 2] >= -1e-9]
    errors = (rows @ grid.T - wanted[..., None]).square().sum(-2)
    own = (rows @ found[..., None] - wanted[..., None]).square().sum((-2, -1))
    assert (found >= 0).all() and (own <= errors.amin(-1) + 1e-6).all()
    torch.testing.assert_close(found, grid[errors.argmin(-1)], atol=0.02, rtol=0)
    assert simplex_weights(torch.ones(1, 1, 2, 3).double(), wanted[:1, :, :2]).isnan().all()


def test_densities_are_scipys() -> None:
    batch = draw(PROBLEM, 20)
    exact, found = _exact(PROBLEM, batch), PROBLEM.by_task(batch)
    assert found.variances is not None and exact.gaussian_density is not None
    share, mean = PROBLEM.posterior(batch).double().numpy(), found.predictions.double().numpy()
    variance, y = found.variances.double().numpy(), batch.ys.double().numpy()[..., None]
    np.testing.assert_allclose(
        exact.density, np.log((share * norm(mean, variance**0.5).pdf(y)).sum(-1)), rtol=1e-4
    )
    centre = (share * mean).sum(-1)
    spread = (share * (variance + mean**2)).sum(-1) - centre**2
    expected = norm(centre, spread**0.5).logpdf(y[..., 0])
    np.testing.assert_allclose(exact.gaussian_density, expected, rtol=1e-4, atol=1e-4)


class PlantedModel(nn.Module):
    """Predicts exactly what the mixture does; its vectors are averages of the tasks' vectors."""

    def __init__(self, problem: Any, shift: float) -> None:
        super().__init__()
        self.problem, self.shift, self.cfg = problem, shift, SimpleNamespace(n_layers=2)
        self.centres = torch.randn(2, 9, generator=torch.Generator().manual_seed(5))

    def run_with_hooks(self, tokens: Tensor, fwd_hooks: Any = ()) -> Tensor:
        xs, ys = tokens[:, ::2], tokens[:, 1::2, 0]
        ys = torch.cat([ys, torch.zeros(len(xs), xs.shape[1] - ys.shape[1])], dim=1)
        found = lab.bayes_mixture(
            xs, ys, bases=self.problem.bases, noise_variance=self.problem.noise_variance
        )
        around = torch.randn(
            len(xs), tokens.shape[1], 9, generator=torch.Generator().manual_seed(1)
        )
        around[:, ::2] = found.probabilities @ self.centres
        for layer, (_, hook) in enumerate(fwd_hooks):
            hook(around if layer else around.roll(1, 1), None)
        return found.prediction + self.shift


class PlantedDice(nn.Module):
    """Gives the exact mixture's logits, or the same for all tokens."""

    def __init__(self, problem: Dice, exact: bool) -> None:
        super().__init__()
        self.problem, self.exact, self.cfg = problem, exact, SimpleNamespace(n_layers=1)

    def run_with_hooks(self, tokens: Tensor, fwd_hooks: Any = ()) -> Tensor:
        batch = lab.Batch(tokens, tokens[:, 1:], tokens[:, 0])
        logits = (self.problem.posterior(batch) @ self.problem.dice).log()
        for _, hook in fwd_hooks:
            hook(torch.randn(*tokens.shape, 6, generator=torch.Generator().manual_seed(0)), None)
        return logits if self.exact else torch.zeros_like(logits)


@dataclass(frozen=True, repr=False)
class PlantedRun(Run):
    made: Any = None

    def model(self, step: int | None = None, *, device: Any = "cpu") -> Any:
        return self.made


def planted(run: Run, problem: lab.Problem, model: Any) -> PlantedRun:
    fields = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
    config = dataclasses.replace(run.config, problem=problem, vector_loss=None)
    return PlantedRun(**{**fields, "config": config}, made=model)


def test_a_model_that_averages_exactly_has_no_gap(run: Run) -> None:
    found = bma_gap(planted(run, PROBLEM, PlantedModel(PROBLEM, 0.0)), n=100, n_implied=20)
    assert found.divergence.max() < 1e-6 and found.gaussian_regret is not None
    torch.testing.assert_close(found.regret, found.gaussian_regret, atol=1e-4, rtol=1e-4)
    assert found.implied[0].isnan() and found.implied_distance[1:].max() < 1e-3
    assert (found.shuffled_distance[1:] > 0.1).all()
    assert found.best_layer == 1 and found.barycentric[1, 0].isnan()
    assert (found.barycentric[1, 1:] > 0.999).all() and (found.explained[1, 1:] > 0.999).all()
    assert (found.barycentric[0].nan_to_num() < 0.3).all()
    # Where the demonstrations leave the task open, the true task explains less than the posterior.
    assert found.barycentric_label[1, 1] < 0.6
    assert (found.barycentric_shuffled[1, 1:] < 0.2).all()


def test_the_divergence_of_a_number_is_its_squared_distance_over_twice_the_variance(
    run: Run,
) -> None:
    found = bma_gap(planted(run, PROBLEM, PlantedModel(PROBLEM, 0.3)), n=50)
    labels = torch.arange(2).repeat(50)
    batch = PROBLEM.sample(100, torch.Generator().manual_seed(41), labels=labels)
    variance = _exact(PROBLEM, batch).variance
    torch.testing.assert_close(
        found.divergence, (0.09 / (2 * variance)).mean(0).float(), rtol=1e-3, atol=0
    )
    assert found.gaussian_regret is not None and found.regret[-1] > found.gaussian_regret[-1]


def test_the_divergence_of_tokens_is_scipys(run: Run) -> None:
    problem = Dice()
    exact = bma_gap(planted(run, problem, PlantedDice(problem, True)), n=40)
    assert exact.divergence.abs().max() < 1e-6 and exact.gaussian_regret is None
    torch.testing.assert_close(exact.regret, exact.exact_regret, atol=1e-5, rtol=1e-5)
    assert exact.implied_distance.max() < 1e-3 < exact.shuffled_distance[1]
    flat = bma_gap(planted(run, problem, PlantedDice(problem, False)), n=40)
    labels = torch.arange(3).repeat(40)
    batch = problem.sample(120, torch.Generator().manual_seed(41), labels=labels)
    mixture = (problem.posterior(batch) @ problem.dice).numpy()
    expected = entropy(mixture, np.full(4, 0.25), axis=-1).mean(0)
    np.testing.assert_allclose(flat.divergence, expected, rtol=1e-4)
    assert (flat.exact_regret <= flat.bound + 1e-6).all() and flat.regret[-1] > flat.bound[-1]


def test_what_has_no_exact_average_is_refused(run: Run) -> None:
    def wanted(problem: lab.Problem, message: str, **settings: Any) -> None:
        with pytest.raises(ValueError, match=message):
            bma_gap(planted(run, problem, None), **settings)

    wanted(lab.RegressionFamilies(), "RegressionFamilies has no exact posterior")
    wanted(lab.SparseLinearMixture(noise_variance=0.0), "a posterior needs a positive variance")
    wanted(PROBLEM, "n_queries is 1; choose 2", n_queries=1)
    wanted(PROBLEM, "token_offset is 1", token_offset=1)
    wanted(PROBLEM, "n is 3; ask for 4", n=3)
    with pytest.raises(ValueError, match=r"no exact predictions by task; give it a method by_task"):
        lab.RegressionFamilies().by_task(draw(lab.RegressionFamilies(), 2))

    @dataclass(frozen=True)
    class Hinged(lab.SparseLinearMixture):
        loss_kind = "hinge"

    wanted(Hinged(), "outputs of 1 numbers with the loss 'hinge'")


def test_the_shipped_model_approaches_the_average() -> None:
    shipped = lab.shipped_run()
    gaps = [bma_gap(shipped, step, n=40, n_implied=4, n_queries=10) for step in (1280, 26000)]
    first, last = gaps
    assert last.divergence.mean() < first.divergence.mean() / 5
    assert last.implied_distance.nanmean() < 0.5 * first.implied_distance.nanmean()
    assert last.best_layer == 4 and last.barycentric[4, 4:].min() > 0.6
    assert (last.barycentric_shuffled[4, 1:] < 0.1).all()
    before = bma_gap(shipped, n=40, n_implied=4, n_queries=4, token_offset=-1)
    assert before.barycentric[:, 0].isnan().all() and before.barycentric[4, -1] > 0.8
    assert last.to_frame().shape == (16, 15) and "step 26000" in repr(last)
    figure = plot_bma_gap(gaps)
    assert len(figure.axes) == 4
    plt.close(figure)


# --- Answers from the vector alone ---------------------------------------------------------------


def test_the_answer_from_a_vector_is_that_of_a_patched_prompt(run: Run) -> None:
    model, batch, layer, point = run.model(), draw(PROBLEM, 5), 0, 4
    tokens = PROBLEM.tokens(batch)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        vectors = cache[f"blocks.{layer}.hook_resid_post"][:, 2 * point - 1]

        def place(_: Tensor, hook: Any) -> Tensor:
            return model.W_pos[2 * point - 1 : 2 * point + 1].expand(5, -1, -1)

        def patch(residual: Tensor, hook: Any) -> Tensor:
            return torch.stack([vectors, residual[:, 1]], dim=1)

        short = torch.stack([torch.zeros(5, PROBLEM.dim), batch.xs[:, point]], dim=1)
        short = torch.cat([short, torch.zeros(5, 1, PROBLEM.dim)], dim=1)[:, :2]
        placing, patching = ("hook_pos_embed", place), (f"blocks.{layer}.hook_resid_post", patch)

        def last(hooks: list[Any]) -> Tensor:
            kept: list[Tensor] = []
            reading = ("ln_final.hook_normalized", lambda value, hook: kept.append(value[:, 1]))
            model.run_with_hooks(short, fwd_hooks=[*hooks, reading])
            return model.read_out(kept[0])[:, 0]

        given = partial(answers_from_vectors, model, PROBLEM, batch, points=[2, point])
        torch.testing.assert_close(given(layer)[:, 1], last([placing, patching]))
        torch.testing.assert_close(given(None)[:, 1], last([placing]))
        torch.testing.assert_close(given(1), given(None))  # after the last block nothing reads it
        assert not torch.allclose(given(0), given(None), atol=1e-4)
        order = torch.tensor([1, 2, 3, 4, 0])
        vectors = vectors[order]
        torch.testing.assert_close(given(layer, donors=order)[:, 1], last([placing, patching]))


def test_the_training_loss_is_the_weighted_mean_of_the_two(run: Run) -> None:
    model = run.model()
    seeded = torch.Generator().manual_seed(3)
    found = CONFIG.loss(model, model.forward, seeded, False)
    batch = PROBLEM.sample(16, torch.Generator().manual_seed(3))
    usual = (model(batch.xs, batch.ys) - batch.ys).square().mean()
    alone = answers_from_vectors(model, PROBLEM, batch, 0, points=range(1, 6))
    of_vector = (alone - batch.ys[:, 1:]).square().mean()
    torch.testing.assert_close(found, (usual + 0.5 * of_vector) / 1.5)
    plain = dataclasses.replace(CONFIG, vector_loss=None)
    seeded.manual_seed(3)
    torch.testing.assert_close(plain.loss(model, model.forward, seeded, False), usual)


def test_a_run_with_the_loss_is_kept_read_and_resumed(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = json.loads((run.path / "config.json").read_text())
    assert saved["vector_loss"] == {"layer": 0, "weight": 0.5}
    assert lab.load_run(run.path).config == CONFIG
    assert lab.shipped_run().config.vector_loss is None  # its config.json does not name it
    for other, message in (
        (VectorLoss(0, 0.25), r"vector_loss\.weight is 0\.5, not 0\.25"),
        (None, r"its vector_loss is \{'layer': 0, 'weight': 0\.5\}, not None"),
    ):
        with pytest.raises(ValueError, match=message):
            config = dataclasses.replace(CONFIG, vector_loss=other)
            lab.train(config, run.path, progress=False, device="cpu")

    class Killed(BaseException):
        pass

    take, taken = loop._take_step, []

    def killing(*args: Any) -> None:
        taken.append(args)
        if len(taken) == 13:
            raise Killed
        take(*args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "_take_step", killing)
        lab.train(CONFIG, tmp_path / "killed", progress=False, device="cpu")
    resumed = lab.train(CONFIG, tmp_path / "killed", progress=False, device="cpu")
    for name, value in run.model().state_dict().items():
        assert torch.equal(value, resumed.model().state_dict()[name]), name
    plain = dataclasses.replace(CONFIG, vector_loss=None)
    without = lab.train(plain, tmp_path / "plain", progress=False, device="cpu")
    assert not torch.equal(without.loss[-1], run.loss[-1])


@dataclass(frozen=True)
class Levels(lab.Problem):
    """Outputs near a level that the sequence keeps, whatever the inputs."""

    dim: int = 2
    n_points: int = 5
    tasks: tuple[str, ...] = ("low", "high")

    def sample(
        self, batch_size: int, generator: torch.Generator, *, labels: Any = None
    ) -> lab.Batch:
        if labels is None:
            labels = torch.randint(2, (batch_size,), generator=generator)
        xs = torch.randn(batch_size, 5, 2, generator=generator)
        noise = 0.1 * torch.randn(batch_size, 5, generator=generator)
        return lab.Batch(xs, 2.0 * labels[:, None] - 1 + noise, labels)


def test_training_with_the_loss_moves_the_answer_into_the_vector(tmp_path: Path) -> None:
    found = {}
    for name, loss in (("with", VectorLoss(0)), ("without", None)):
        config = dataclasses.replace(
            CONFIG, problem=Levels(), steps=120, batch_size=32, vector_loss=loss
        )
        trained = lab.train(config, tmp_path / name, progress=False, device="cpu")
        found[name] = vector_error_by_layer(trained, n=200)
    asked, other = found["with"], found["without"]
    assert asked.own[0] < 0.75 * other.own[0] and asked.recovered[0] > 0.8
    assert asked.own[0] < 0.75 * asked.other_task[0] and asked.trained_layer == 0
    assert asked.own[1] == pytest.approx(asked.without) and other.trained_layer is None
    assert (asked.intervals[:, 0] < asked.own).all() and (asked.own < asked.intervals[:, 1]).all()
    batch_error = float(trained.late_loss[-1].mean())  # of other sequences
    assert other.few_shot == pytest.approx(batch_error, rel=0.3)
    labels = plot_vector_errors(found).get_legend_handles_labels()[1]
    assert {"with", "with: trained layer", "without: demonstrations"} <= set(labels)
    plt.close("all")


def test_where_the_loss_is_not_defined_it_is_refused(run: Run) -> None:
    replaced = partial(dataclasses.replace, CONFIG)
    with pytest.raises(ValueError, match="layer 1, after which a model of 2 blocks .* 0 to 0"):
        replaced(vector_loss=VectorLoss(1))
    with pytest.raises(ValueError, match="use two blocks or more"):
        replaced(n_layers=1)
    with pytest.raises(ValueError, match=r"Dice does not say .* without_demonstrations"):
        replaced(problem=Dice())
    with pytest.raises(ValueError, match="layer must be at least 0, got -1"):
        VectorLoss(-1)
    with pytest.raises(ValueError, match="weight must be positive, got 0; .* None"):
        VectorLoss(0, 0)

    @dataclass(frozen=True)
    class Elsewhere(lab.SparseLinearMixture):
        def make_model(self, size: Any, *, seed: int, device: Any) -> nn.Module:
            return nn.Linear(1, 1)

    with pytest.raises(ValueError, match="the problem makes a Linear"):
        replaced(problem=Elsewhere()).model()
    given = run.model(), PROBLEM, draw(PROBLEM, 2)
    with pytest.raises(ValueError, match="layer 2 is out of range: the model has layers 0 to 1"):
        answers_from_vectors(*given, 2, points=[1])
    with pytest.raises(ValueError, match="points holds 0; .* choose from 1 to 5"):
        answers_from_vectors(*given, 0, points=[0])
    with pytest.raises(ValueError, match="n is 1"):
        vector_error_by_layer(run, n=1)


# --- Norms -------------------------------------------------------------------------------------


def test_norms_are_correlated_with_the_error_by_the_textbook() -> None:
    shipped = lab.shipped_run()
    found = norms_and_error(shipped)
    layer, loss = 3, shipped.late_loss.mean(1).numpy()
    norms = torch.stack(shipped.norms)[:, layer].mean(1).numpy()
    assert found.rank_correlation[layer] == pytest.approx(spearmanr(norms, loss).statistic)
    x, y = np.log(norms[1:]), np.log(loss[1:])
    z = np.log(shipped.steps[1:])
    r = np.corrcoef([x, y, z])
    expected = (r[0, 1] - r[0, 2] * r[1, 2]) / np.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))
    assert found.partial_correlation[layer] == pytest.approx(expected, abs=1e-4)
    frame = found.to_frame()
    assert len(frame) == 12 * 6 and frame.norm[layer] == pytest.approx(norms[0], rel=1e-5)
    figure = plot_norms(shipped)
    assert len(figure.axes[0].get_lines()) == 6
    plt.close(figure)


def test_a_norm_that_only_follows_the_step_has_no_partial_correlation() -> None:
    steps = (0, *(int(10 * 1.7**k) for k in range(12)))
    noise = torch.randn(2, 13, generator=torch.Generator().manual_seed(0))
    time = torch.tensor([1.0, *steps[1:]]).log()
    following, loss = (time + 0.02 * noise[0]).exp(), (-time + 0.02 * noise[1]).exp()
    coupled = loss**-1.0
    norms = torch.stack([following, coupled], dim=1)[..., None]
    found = NormsAndError(steps, norms, loss, "squared_error")
    assert (found.rank_correlation < -0.95).all()
    assert abs(found.partial_correlation[0]) < 0.5
    assert found.partial_correlation[1] == pytest.approx(-1.0, abs=1e-3)
    few = NormsAndError(steps[:4], norms[:4], loss[:4], "squared_error")
    assert few.partial_correlation.isnan().all()


def test_a_run_without_norms_is_refused(run: Run) -> None:
    bare = dataclasses.replace(run, norms=tuple(torch.zeros(0, 0) for _ in run.norms))
    with pytest.raises(ValueError, match="recorded no norms"):
        norms_and_error(bare)
    single = dataclasses.replace(run, steps=run.steps[:1])
    with pytest.raises(ValueError, match="has 1 checkpoints"):
        norms_and_error(single)
