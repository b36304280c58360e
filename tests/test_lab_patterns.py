"""Patterns and concepts: what is drawn, what the oracles predict, and pruning."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

import transformer_lens_taskvec as tv
from transformer_lens_taskvec import lab
from transformer_lens_taskvec.lab.problems.concepts.finding import (
    _fits,
    concepts_finding,
    same_sign_attention,
)
from transformer_lens_taskvec.lab.problems.concepts.problem import Concepts
from transformer_lens_taskvec.lab.problems.patterns.finding import patterns_finding
from transformer_lens_taskvec.lab.problems.patterns.problem import PatternTasks
from transformer_lens_taskvec.lab.problems.patterns.pruning import (
    PruningCurve,
    neuron_norms,
    prune_neurons,
    pruning_curve,
)
from transformer_lens_taskvec.lab.training.on_problem import Run

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = PatternTasks(m2=5, n_points=10, dim=10)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A model that learns the small problem of patterns in seconds."""
    sizes = {"n_layers": 2, "d_model": 32, "steps": 280, "n_checkpoints": 2, "n_eval": 30}
    config = lab.TrainConfig(problem=SMALL, **{**SMALL.defaults, **sizes})
    trained: Run = lab.train(
        config, tmp_path_factory.mktemp("patterns"), progress=False, device="cpu"
    )
    return trained


@pytest.mark.parametrize("problem", [PatternTasks(), PatternTasks().new_tasks(), SMALL])
def test_each_pattern_is_positive_as_often_as_negative(problem: PatternTasks) -> None:
    positive, negative = zip(*problem.pairs, strict=True)
    assert sorted(positive) == sorted(negative) == sorted(list(range(4)) * len(problem.shifts))
    assert len(set(problem.pairs)) == len(problem.tasks) <= 8


def test_new_tasks_are_all_the_other_pairs() -> None:
    for problem in (PatternTasks(), PatternTasks.paper()):
        known, new = set(problem.pairs), set(problem.new_tasks().pairs)
        assert not known & new and len(known | new) == problem.m1 * (problem.m1 - 1)
    assert (PatternTasks.paper().m1, PatternTasks.paper().m2, PatternTasks.paper().alpha) == (
        6,
        24,
        0.8,
    )


@pytest.mark.parametrize("problem", [PatternTasks(), PatternTasks().shifted()])
def test_the_shares_and_outputs_of_patterns(problem: PatternTasks) -> None:
    labels = torch.full((3000,), 1)
    batch = problem.sample(3000, seeded(), labels=labels)
    a, b = problem.pairs[1]
    patterns = problem.patterns()
    shares = torch.linalg.lstsq(patterns.T, batch.xs[:, :-1].flatten(0, 1).T).solution.T
    carried, ys = shares.argmax(-1), batch.ys[:, :-1].flatten()
    for pattern, share, mean in ((a, 0.4, 1), (b, 0.4, -1)):
        own = carried == pattern
        assert float(own.float().mean()) == pytest.approx(share, abs=0.01)
        assert float(ys[own].mean()) == mean
    others = (carried != a) & (carried != b)
    assert float(ys[others].mean()) == pytest.approx(0, abs=0.03)
    counts = torch.bincount(carried[others], minlength=problem.n_patterns)
    assert (counts > 0).sum() == problem.n_patterns - 2
    query = problem.carried(batch.xs[:, -1])
    torch.testing.assert_close(batch.ys[:, -1], torch.where(query == a, 1.0, -1.0))
    assert float((query == a).float().mean()) == pytest.approx(0.5, abs=0.03)
    assert batch.weights is not None and (batch.weights[:, :4] == 0).all()
    assert (batch.weights[:, -1] == 1).all()


def test_inputs_are_a_pattern_and_at_most_half_of_an_irrelevant_one() -> None:
    problem = PatternTasks(beta=2.0)
    xs = problem.sample(500, seeded()).xs.flatten(0, 1)
    assert (xs[:, 0] == 0).all()  # the outputs' coordinate
    relevant, irrelevant = xs[:, 1:5], xs[:, 5:29]
    assert ((relevant == 2.0).sum(1) == 1).all() and ((relevant != 0).sum(1) == 1).all()
    assert ((irrelevant != 0).sum(1) <= 1).all()
    assert 0.95 < float(irrelevant.abs().max()) <= 1.0


@pytest.mark.parametrize(("m1", "new"), [(4, 3), (6, 3), (5, 5)])
def test_new_patterns_are_as_the_theorem_asks(m1: int, new: int) -> None:
    problem = PatternTasks(m1=m1, shifts=(1,)).shifted(new, seed=3)
    mixing = torch.tensor(problem.mixing, dtype=torch.double)
    torch.testing.assert_close(mixing @ mixing.T, torch.eye(new, dtype=torch.double))
    torch.testing.assert_close(mixing.sum(1), torch.full((new,), (m1 / new) ** 0.5).double())
    norms = problem.patterns().norm(dim=1)
    torch.testing.assert_close(norms, torch.full((new,), problem.beta))
    assert lab.TrainConfig.from_json(lab.TrainConfig(problem=problem).to_json()).problem == problem


def test_nearest_demonstration_is_a_neighbour_classifier() -> None:
    batch = SMALL.sample(60, seeded(1))
    predicted = SMALL.oracles(batch)["nearest demonstration"]
    compared = 0
    for row in range(25):
        patterns = SMALL.carried(batch.xs[row])
        for point in range(1, SMALL.n_points):
            same = patterns[:point] == patterns[point]
            if not same.any():
                assert predicted[row, point] == 0
            elif batch.ys[row, :point][same].unique().numel() == 1:
                near = KNeighborsClassifier(1).fit(
                    np.eye(4)[patterns[:point].numpy()], batch.ys[row, :point].numpy()
                )
                expected = near.predict(np.eye(4)[patterns[point : point + 1].numpy()])
                assert predicted[row, point] == expected[0]
                compared += 1
    assert compared > 80


def test_the_posterior_is_bayes_rule_by_brute_force() -> None:
    batch = SMALL.sample(20, seeded(2))
    found = SMALL.posterior(batch)
    for row in range(20):
        carried = SMALL.carried(batch.xs[row]).tolist()
        for point in range(SMALL.n_points):
            joint = []
            for a, b in SMALL.pairs:
                likelihood = 1.0
                for pattern, y in zip(carried[:point], batch.ys[row, :point].tolist(), strict=True):
                    if pattern in (a, b):
                        likelihood *= 0.4 * (y == (1 if pattern == a else -1))
                    else:
                        likelihood *= 0.2 / 2 / 2
                joint.append(likelihood)
            expected = torch.tensor(joint) / sum(joint)
            torch.testing.assert_close(found[row, point], expected, atol=1e-5, rtol=1e-4)


def test_knowing_the_tasks_helps_and_the_task_itself_is_exact() -> None:
    problem = dataclasses.replace(SMALL, counted_from=0)
    errors = lab.oracle_errors(problem, n_sequences=3000)
    assert errors.told == ("known task",) and (errors["known task"] == 0).all()
    trained, anything = errors["Bayes, these tasks"], errors["Bayes, all tasks"]
    nearest = errors["nearest demonstration"]
    assert trained[2] < anything[2] < nearest[2]
    # Without a demonstration of its pattern, hinge loss 1: 0.6 to the power of the demonstrations.
    expected = 0.6 ** torch.arange(1, 5)
    assert (nearest[1:5] >= expected - 0.03).all()
    assert nearest[0] == 1 and errors.best.startswith("Bayes")


def test_the_loss_is_the_hinge_loss_of_the_points_that_count() -> None:
    losses = SMALL.losses(torch.tensor([2.0, 0.5, -1.0]), torch.ones(3), torch.zeros(3).long())
    assert losses.tolist() == [0.0, 0.5, 2.0]
    config = lab.TrainConfig(problem=SMALL, batch_size=50)
    loss = config.loss(None, lambda tokens: torch.zeros(50, 10), seeded(), False)
    assert float(loss) == 1.0


def test_wrong_settings_of_patterns_are_named() -> None:
    for settings, message in (
        ({"m1": 2}, "m1 must be at least 3"),
        ({"dim": 20}, "dim is 20; 4 \\+ 24 patterns and the output need at least 29"),
        ({"alpha": 0.0}, "alpha must be above 0"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"shifts": (4,)}, r"shifts must be one or more of \[1, 2, 3\]"),
        ({"shifts": (1, 1)}, "shifts must differ"),
        ({"counted_from": 21}, "counted_from must be a point, 0 to 20"),
        ({"mixing": ((1.0, 0.0),)}, "at least 3 rows of m1 = 4"),
        ({"mixing": ((0.6, -0.8, 0, 0),) * 3}, "norm 1.000 and sum -0.200"),
    ):
        with pytest.raises(ValueError, match=message):
            PatternTasks(**settings)
    with pytest.raises(ValueError, match="no task is held out"):
        PatternTasks(shifts=(1, 2, 3)).new_tasks()
    with pytest.raises(ValueError, match="m1_new must be 3 to m1 = 4, got 5"):
        PatternTasks().shifted(5)


def silenced_by(post: Tensor, hook: Any, cut: Tensor) -> Tensor:
    return post * ~cut


def test_a_pruned_neuron_has_no_output_and_the_model_is_left_alone(run: Run) -> None:
    model = run.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = SMALL.tokens(SMALL.sample(3, seeded()))
    for order in ("smallest", "largest", "random"):
        pruned = prune_neurons(model, 0.25, order=order)
        cut = [block.mlp.w_out.norm(dim=0) == 0 for block in pruned.blocks]
        assert [int(one.sum()) for one in cut] == [32, 32]
        sizes = torch.stack([block.mlp.w_out.detach().norm(dim=0) for block in model.blocks])
        gone, kept = (sizes.gather(1, torch.stack(c).int().argsort(1)) for c in (cut, cut))
        gone, kept = gone[:, -32:], kept[:, :-32]
        if order == "smallest":
            assert (gone.amax(1) <= kept.amin(1)).all()
        if order == "largest":
            assert (gone.amin(1) >= kept.amax(1)).all()

        hooks = [
            (f"blocks.{layer}.mlp.hook_post", partial(silenced_by, cut=one))
            for layer, one in enumerate(cut)
        ]
        silenced = model.run_with_hooks(tokens, fwd_hooks=hooks)
        torch.testing.assert_close(pruned(tokens), silenced)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    one, same, other = (prune_neurons(model, 0.5, order="random", seed=s) for s in (0, 0, 1))
    assert torch.equal(neuron_norms(one), neuron_norms(same))
    assert not torch.equal(neuron_norms(one), neuron_norms(other))


def test_the_product_of_norms_ranks_neurons_by_both_weights(run: Run) -> None:
    mlp = run.model().blocks[1].mlp
    expected = [
        float(mlp.w_out[:, i].square().sum().sqrt() * mlp.w_in[i].square().sum().sqrt())
        for i in range(128)
    ]
    assert neuron_norms(run.model(), by="product")[1].tolist() == pytest.approx(expected, rel=1e-5)


def test_pruning_refuses_what_it_cannot_prune(run: Run) -> None:
    with pytest.raises(ValueError, match=r"model is a Linear without blocks\[l\]\.mlp\.w_in"):
        prune_neurons(nn.Linear(2, 2), 0.5)
    bare = SimpleNamespace(blocks=[SimpleNamespace(mlp=nn.Linear(2, 2))])
    with pytest.raises(ValueError, match="give a model of the lab"):
        prune_neurons(bare, 0.5)
    for settings, message in (
        ({"fraction": 1.5}, "fraction must be 0 to 1, got 1.5"),
        ({"fraction": 0.5, "by": "size"}, "by must be one of"),
        ({"fraction": 0.5, "order": "first"}, "order must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            prune_neurons(run.model(), **settings)
    for wrong, message in (
        ({"fractions": (0.5,)}, "ascend from 0"),
        ({"layer": 2}, "layer 2 is out of range: there are 0 to 1"),
        ({"place": "demos"}, "place must be one of"),
        ({"n_random": 0}, "n_random 0; ask for 1 or more of each"),
    ):
        with pytest.raises(ValueError, match=message):
            pruning_curve(run, **wrong)


@dataclass(frozen=True)
class Ordered(lab.Problem):
    """Every output is the task's sign, or the opposite at each second point; so is the query's."""

    dim: int = 2
    n_points: int = 5
    tasks: tuple[str, ...] = ("plus", "minus")

    def sample(
        self, batch_size: int, generator: torch.Generator, *, labels: Any = None
    ) -> lab.Batch:
        if labels is None:
            labels = torch.randint(2, (batch_size,), generator=generator)
        ys = (1.0 - 2 * labels[:, None]) * torch.tensor([1.0, -1, 1, -1, 1])
        return lab.Batch(torch.ones(batch_size, 5, 2), ys, labels)

    def right(self, predictions: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
        return predictions * targets > 0


class Planted(HookedRootModule):
    """Holds the task's sign at the query; two of four neurons read it, and two do nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.cfg = SimpleNamespace(n_layers=1, model_name="planted")
        block = nn.Module()
        block.hook_resid_post = HookPoint()
        block.mlp = nn.Module()
        block.mlp.w_in = nn.Parameter(torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, 1]]))
        block.mlp.w_out = nn.Parameter(torch.tensor([[1.0, -1, 0.01, -0.01], [0, 0, 0, 0]]))
        self.blocks = nn.ModuleList([block])
        setup: Any = super().setup
        setup()

    def forward(self, tokens: Tensor) -> Tensor:
        residual = torch.zeros(*tokens.shape[:2], 2)
        residual[:, -1, 0] = tokens[:, 1::2, 0] @ torch.tensor([1.0, -1, 1, -1])
        [block] = self.blocks
        hidden = (block.hook_resid_post(residual) @ block.mlp.w_in.T).relu()
        return (hidden @ block.mlp.w_out.T)[:, ::2, 0]


def test_a_planted_task_vector_is_found_and_lost_with_its_neurons() -> None:
    run: Any = SimpleNamespace(
        config=SimpleNamespace(problem=Ordered()), model=lambda step: Planted()
    )
    curve = pruning_curve(run, fractions=(0, 0.5, 1), n=60)
    assert (curve.layer, curve.place, curve.n) == (0, "query", 120)
    smallest, largest, _ = range(3)
    assert curve.orders == ("smallest", "largest", "random")
    # Of the 6 orders of two positive and two negative outputs, one is the true one.
    assert curve.no_vector[smallest, 0] == pytest.approx(1 / 6, abs=0.1)
    for order, intact in ((smallest, [1, 1, 0]), (largest, [1, 0, 0])):
        assert curve.accuracy[order].tolist() == curve.own_vector[order].tolist() == intact
    assert (curve.other_vector[:2] == 0).all()
    assert curve.free_fraction("smallest") == 0.5 and curve.free_fraction("largest") == 0
    torch.testing.assert_close(curve.gain, curve.own_vector - curve.no_vector)
    frame = curve.to_frame()
    assert len(frame) == 9 and frame.own_vector[0] == 1
    assert "own task's vector at layer 0 (query) 1.000" in repr(curve)
    with pytest.raises(ValueError, match="no order 'first'"):
        curve.free_fraction("first")


def test_pruning_all_neurons_leaves_the_attention(run: Run) -> None:
    curve: PruningCurve = pruning_curve(run, fractions=(0, 1), n=40, n_random=1)
    assert (curve.accuracy[:, 1] == curve.accuracy[0, 1]).all()
    model = run.model()
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.w_out.zero_()
    batch = SMALL.sample(2000, seeded(9))
    with torch.no_grad():
        predicted = SMALL.predict(model, batch)[:, -1]
    accuracy = float((predicted * batch.ys[:, -1] > 0).float().mean())
    assert float(curve.accuracy[0, 1]) == pytest.approx(accuracy, abs=0.06)


def test_patterns_are_learned_and_measured_like_any_problem(run: Run) -> None:
    assert float(run.accuracy[-1, :, -1].mean()) > 0.9 > float(run.accuracy[0, :, -1].mean())
    assert run.loss[..., :4].isnan().all() and not run.loss[..., 4:].isnan().any()
    found = lab.measure_emergence(run, steps=run.steps[::2], n=11, n_oracle=50, progress=False)
    assert found.loss_kind == "hinge" and "nearest demonstration" in found.oracles.names
    figures = lab.emergence_figures(run, found, n=11)
    low, high = figures["oracles"].axes[0].get_ylim()
    assert 0 < low < high
    finding = patterns_finding(run, n=600, n_pruning=5)
    numbers = finding.numbers
    for kind in ("training tasks", "new tasks", "new patterns"):
        batch = {
            "training tasks": SMALL,
            "new tasks": SMALL.new_tasks(),
            "new patterns": SMALL.shifted(),
        }[kind].sample(3000, seeded(4))
        with torch.no_grad():
            predicted = SMALL.predict(run.model(), batch)[:, -1]
        accuracy = float((predicted * batch.ys[:, -1] > 0).float().mean())
        assert numbers[f"accuracy, {kind}"] == pytest.approx(accuracy, abs=0.04)
    late = 1 - 0.6**9 / 2  # it guesses where no demonstration has the query's pattern
    assert numbers["accuracy, nearest demonstration"] == pytest.approx(late, abs=0.01)
    assert f"{numbers['accuracy, new tasks']:.1%} of new tasks" in finding.sentence


CONCEPTS = Concepts(n_concepts=3, dim=13, n_points=8, presence=0.4)


def test_words_and_labels_have_the_stated_products() -> None:
    problem = Concepts(n_concepts=4, kappa_x=0.3, kappa_y=0.7)
    for features, kappa in ((problem.words(), 0.3), (problem.label_features(), 0.7)):
        products = torch.einsum("ksd,jtd->ksjt", features, features)
        for k in range(4):
            for j in range(4):
                own = torch.tensor([[1, kappa], [kappa, 1]])
                expected = own if j == k else torch.zeros(2, 2)
                torch.testing.assert_close(products[k, :, j], expected)
    assert (torch.einsum("ksd,jtd->ksjt", problem.words(), problem.label_features()) == 0).all()


def test_inputs_hold_their_concepts_words_and_outputs_their_labels() -> None:
    problem = dataclasses.replace(CONCEPTS, noise=1e-4)
    labels = torch.full((400,), 2)
    batch = problem.sample(400, seeded(), labels=labels)
    tokens = problem.tokens(batch)
    words, features = problem.words(), problem.label_features()
    xs, outputs = tokens[:, ::2], tokens[:, 1::2]
    assert torch.equal(xs, batch.xs) and outputs.shape == (400, 7, 13)
    # Coordinates in the basis of words, by a solver that knows nothing of how they were made.
    basis = words.flatten(0, 1)
    held = torch.linalg.lstsq(basis.T, xs.flatten(0, 1).T).solution.T.view(-1, 3, 2)
    own = held[:, 2]
    signs = batch.ys.flatten()
    torch.testing.assert_close(own[:, 1], (signs > 0).float(), atol=0.01, rtol=0)
    torch.testing.assert_close(own[:, 0], (signs < 0).float(), atol=0.01, rtol=0)
    present = held[:, :2].sum(-1)
    assert float(present.mean()) == pytest.approx(0.4, abs=0.02)
    shown = torch.linalg.lstsq(features.flatten(0, 1).T, outputs.flatten(0, 1).T).solution.T
    demos = held.view(400, 8, 3, 2)[:, :7].flatten(0, 1)
    torch.testing.assert_close(shown.view(-1, 3, 2), demos, atol=0.01, rtol=0)
    switched = problem.switched()
    other = switched.tokens(switched.sample(400, seeded(), labels=labels))
    torch.testing.assert_close(other[:, ::2], xs)
    shown = torch.linalg.lstsq(features.flatten(0, 1).T, other[:, 1::2].flatten(0, 1).T).solution.T
    torch.testing.assert_close(shown.view(-1, 3, 2), demos.flip(-1), atol=0.01, rtol=0)


def test_the_posterior_over_concepts_is_bayes_rule_by_densities() -> None:
    problem = dataclasses.replace(CONCEPTS, noise=0.4).skewed()
    batch = problem.sample(15, seeded(3))
    found, logits = problem.posterior(batch), problem.oracles(batch)["Bayes"]
    words, shares, presence = problem.words(), problem.frequencies, problem.presences
    codes = list(itertools.product((None, 0, 1), repeat=3))  # of each concept

    def densities(x: Tensor) -> Tensor:
        """p(x, e | concept), [concept, sign], by a sum over all codes."""
        total = torch.zeros(3, 2, dtype=torch.double)
        for code in codes:
            mean = sum((words[j, e] for j, e in enumerate(code) if e is not None), torch.zeros(13))
            density = math.exp(-float((x - mean).square().sum()) / (2 * 0.4**2))
            for k in range(3):
                if code[k] is None:
                    continue
                prior = 1.0
                for j, e in enumerate(code):
                    p = float(presence[j])
                    prior *= 1 / 2 if j == k else 1 - p if e is None else p / 2
                total[k, code[k]] += prior * density
        return total

    for row in range(15):
        weights = shares.double()
        for point in range(problem.n_points):
            torch.testing.assert_close(
                found[row, point].double(), weights / weights.sum(), atol=1e-4, rtol=1e-3
            )
            both = densities(batch.xs[row, point])
            joint = (weights[:, None] * both).sum(0)
            expected = float((joint[1] / joint[0]).log())
            assert float(logits[row, point]) == pytest.approx(expected, abs=2e-3, rel=2e-3)
            weights = weights * both.sum(1)


def test_oracles_out_of_distribution() -> None:
    problem = Concepts()
    for kind in (problem, problem.skewed(), problem.switched()):
        batch = kind.sample(1000, seeded(5))
        wrong = {
            name: 1 - float(kind.right(of, batch.ys, batch.labels[:, None])[:, 8:].double().mean())
            for name, of in kind.oracles(batch).items()
        }
        assert wrong["known concept"] == 0 and wrong["Bayes"] < 0.001
        assert 0.1 < wrong["nearest demonstration"] < 0.3
        for row in range(20):
            xs, ys = batch.xs[row].numpy(), batch.ys[row].numpy()
            products = xs[:-1] @ xs[-1]
            expected = 2 * ys[products.argmax()]
            assert float(kind.oracles(batch)["nearest demonstration"][row, -1]) == expected
    counts = torch.bincount(problem.skewed().sample(4000, seeded()).labels, minlength=8) / 4000
    torch.testing.assert_close(counts, problem.skewed().frequencies, atol=0.02, rtol=0)
    assert lab.oracle_errors(problem, n_sequences=200).told == ("known concept",)


def test_attention_to_the_querys_sign() -> None:
    config = lab.RegressionConfig(d_input=13, n_points=8, n_layers=1, n_heads=1, d_model=16)
    model = lab.RegressionTransformer(config, seed=1)
    found = same_sign_attention(model, CONCEPTS, n=300)
    batch = CONCEPTS.sample(300, seeded(52))
    _, cache = model.run_with_cache(CONCEPTS.tokens(batch))
    pattern = cache["blocks.0.attn.hook_pattern"][:, 0, -1]
    total = same = 0.0
    for row in range(300):
        on = [float(pattern[row, 2 * i] + pattern[row, 2 * i + 1]) for i in range(7)]
        agree = [i for i in range(7) if batch.ys[row, i] == batch.ys[row, -1]]
        total += sum(on) / 300
        same += sum(on[i] for i in agree) / sum(on) / 300
    assert float(found.demos) == pytest.approx(total, rel=1e-4)
    assert float(found.same) == pytest.approx(same, rel=1e-4)
    assert found.to_frame().shape == (1, 4)
    with pytest.raises(ValueError, match="outputs of SparseLinearMixture are not signs"):
        same_sign_attention(model, lab.SparseLinearMixture.small())


def test_wrong_settings_of_concepts_are_named() -> None:
    for settings, message in (
        ({"n_concepts": 9}, "n_concepts must be at least 2 and dim at least 4 times as much"),
        ({"kappa_x": 1.0}, "kappa_x must be between 0 and 1, got 1.0"),
        ({"presence": 0.0}, "presence must be between 0 and 1"),
        ({"noise": 0.0}, "noise must be positive"),
        ({"shares": (0.5, 0.5)}, "shares must be 8 positive numbers that add up to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Concepts(**settings)


def test_concepts_are_trained_measured_and_described(tmp_path: Path) -> None:
    sizes = {"n_layers": 1, "d_model": 16, "steps": 30, "n_checkpoints": 3, "n_eval": 20}
    config = lab.TrainConfig(problem=CONCEPTS, **{**CONCEPTS.defaults, **sizes})
    run = lab.train(config, tmp_path / "run", progress=False, device="cpu")
    assert lab.load_run(tmp_path / "run").config == config
    found = lab.measure_emergence(run, n=12, n_oracle=50, progress=False)
    assert found.loss_kind == "logistic" and found.oracles.best == "Bayes"
    decoded = tv.task_decodability(tv.collect(run.model(), lab.problem_episodes(CONCEPTS, 12)))
    assert decoded.scores.shape == (1, 3)
    finding = concepts_finding(run, n=300)
    numbers = finding.numbers
    batch = CONCEPTS.switched().sample(2000, seeded(6))
    with torch.no_grad():
        predicted = CONCEPTS.switched().predict(run.model(), batch)
    wrong = float((predicted * batch.ys <= 0)[:, 4:].float().mean())
    assert numbers["error, switched, model"] == pytest.approx(wrong, abs=0.05)
    assert len(numbers["error by step"]) == len(run.steps)
    paths = finding.save(tmp_path / "figures")
    assert {path.name for path in paths if path.suffix == ".png"} == {
        "finding_attention.png",
        "finding_error.png",
        "finding_transfer.png",
    }


def test_a_straight_fall_is_told_from_a_power_law() -> None:
    steps = tuple(range(1, 400, 20))
    exponential = _fits(steps, [0.5 * math.exp(-step / 50) for step in steps], lowest=1e-9)
    power = _fits(steps, [0.5 * step**-1.5 for step in steps], lowest=1e-9)
    assert exponential["R^2, exponential"] > 0.999 > exponential["R^2, power law"]
    assert exponential["rate per 1000 steps"] == pytest.approx(20)
    assert power["R^2, power law"] > 0.995 > power["R^2, exponential"]
    assert power["exponent of the power law"] == pytest.approx(1.5, rel=0.03)
    assert _fits(steps, [0.5] * len(steps), lowest=0.01) == {"checkpoints in the fall": 0}
