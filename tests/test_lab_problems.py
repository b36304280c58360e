"""Mixtures: what the sequences are, and that they are seeded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from transformer_lens_taskvec.lab.problems.base import Problem, balanced_labels
from transformer_lens_taskvec.lab.problems.families import (
    LeakyReLU,
    LinearOnRepresentation,
    RegressionFamilies,
    SparseLinear,
    linear,
    quadratic,
)
from transformer_lens_taskvec.lab.problems.sparse_linear import SparseLinearMixture

pytestmark = pytest.mark.usefixtures("one_thread")

SPARSE = [
    SparseLinearMixture(),
    SparseLinearMixture.orthogonal(6, 4),
    SparseLinearMixture.overlapping(),
    SparseLinearMixture.small(),
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("problem", SPARSE, ids=["default", "six", "overlapping", "small"])
def test_outputs_depend_on_the_basis_alone(problem: SparseLinearMixture) -> None:
    labels = balanced_labels(len(problem.bases), 400)
    batch = problem.sample(len(labels), seeded(), labels=labels)
    slopes = (batch.xs * batch.ys[..., None]).mean(1).square().view(len(problem.bases), 400, -1)
    inside = problem.masks().bool()
    strongest_outside = torch.where(inside, 0, slopes.mean(1)).amax(-1)
    weakest_inside = torch.where(inside, slopes.mean(1), torch.inf).amin(-1)
    assert (weakest_inside > 2 * strongest_outside).all()


def test_the_settings_of_the_paper() -> None:
    default, six, overlapping, small = SPARSE
    assert (default.dim, len(default.tasks), default.n_points) == (16, 4, 20)
    assert (six.dim, len(six.tasks)) == (24, 6)
    assert (small.dim, len(small.tasks), small.n_points) == (8, 4, 16)
    for problem in (default, six, small):
        assert (problem.masks().sum(0) == 1).all()
    masks = overlapping.masks()
    assert masks.shape == (8, 16) and (masks.sum(1) == 4).all()
    assert (masks[:4, 8:] == 0).all() and (masks[4:, :8] == 0).all()
    overlap = masks @ masks.T
    assert (overlap.fill_diagonal_(0)[:4, :4].amax(1) == 2).all()


def test_noise_and_weights_have_the_stated_variances() -> None:
    problem = SparseLinearMixture(dim=3, bases=((0, 1),), noise_variance=0.25, n_points=40)
    batch = problem.sample(4000, seeded())
    solved = torch.linalg.lstsq(batch.xs[..., :2], batch.ys[..., None])
    residual = batch.ys[..., None] - batch.xs[..., :2] @ solved.solution
    torch.testing.assert_close(
        residual.square().sum() / (4000 * (40 - 2)), torch.tensor(0.25), rtol=0.02, atol=0
    )
    torch.testing.assert_close(batch.xs.var(), torch.tensor(1.0), rtol=0.02, atol=0)
    spread = solved.solution.var() - 0.25 / 37  # what the noise adds to the estimate
    torch.testing.assert_close(spread, torch.tensor(1.0), rtol=0.05, atol=0)


@pytest.mark.parametrize("problem", [SparseLinearMixture.small(), RegressionFamilies(dim=6)])
def test_a_seed_fixes_the_batch_and_labels_are_uniform(problem: Problem) -> None:
    assert isinstance(problem, Problem)
    one, same, other = (problem.sample(4000, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(one.ys, same.ys) and torch.equal(one.xs, same.xs)
    assert not torch.equal(one.ys, other.ys)
    counts = torch.bincount(one.labels, minlength=len(problem.tasks))
    assert (counts > 900).all() and counts.sum() == 4000


def test_every_family_is_the_function_it_says() -> None:
    xs = torch.randn(50, 12, 5, generator=seeded())
    ys = linear(xs, seeded())
    weights = torch.linalg.lstsq(xs, ys[..., None]).solution
    torch.testing.assert_close(xs @ weights, ys[..., None], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(quadratic(xs, seeded()), ys.square() / 10**0.5)
    torch.testing.assert_close(LeakyReLU(0.1)(xs, seeded()), torch.where(ys > 0, ys, 0.1 * ys))
    sparse = torch.linalg.lstsq(xs, SparseLinear(2)(xs, seeded())[..., None]).solution
    assert ((sparse.abs() > 1e-3).sum(1) == 2).all()
    with pytest.raises(ValueError, match="rank must be in"):
        SparseLinear(6)(xs, seeded())


def test_the_representation_is_the_same_in_every_sequence() -> None:
    family = LinearOnRepresentation(width=4, seed=7)
    xs = torch.randn(1, 30, 5, generator=seeded()).expand(20, -1, -1)
    features = family.represent(xs[:1])
    ys = family(xs, seeded(1)).T
    fitted = features[0] @ torch.linalg.lstsq(features[0], ys).solution
    torch.testing.assert_close(fitted, ys, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ys[:, 0], ys[:, 1])
    assert not torch.allclose(LinearOnRepresentation(4, seed=8).represent(xs[:1]), features)


def test_a_family_of_ones_own_is_a_function() -> None:
    def total(xs: Tensor, generator: torch.Generator) -> Tensor:
        return xs.sum(-1)

    problem = RegressionFamilies({"linear": linear, "sum": total}, dim=3, noise_variance=0.0)
    labels = torch.tensor([1, 0, 1])
    batch = problem.sample(3, seeded(), labels=labels)
    torch.testing.assert_close(batch.ys[labels == 1], batch.xs[labels == 1].sum(-1))
    assert not torch.allclose(batch.ys[1], batch.xs[1].sum(-1))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"basis \(0, 4\) is out of range: dim is 4, so coordinates are 0 to 3"
    ):
        SparseLinearMixture(dim=4, bases=((0, 4),))
    with pytest.raises(ValueError, match="each once"):
        SparseLinearMixture(dim=4, bases=((0, 0),))
    with pytest.raises(ValueError, match="n_points"):
        SparseLinearMixture(n_points=1)
    with pytest.raises(ValueError, match="noise_variance"):
        RegressionFamilies(noise_variance=-1.0)
    with pytest.raises(ValueError, match=r"labels must be \[3\]"):
        SparseLinearMixture().sample(3, seeded(), labels=torch.tensor([0]))
    wrong = RegressionFamilies({"flat": lambda xs, generator: xs[..., 0, 0]})
    with pytest.raises(ValueError, match="family 'flat' returned shape"):
        wrong.sample(3, seeded())
