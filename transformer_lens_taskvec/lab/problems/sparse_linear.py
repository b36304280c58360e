"""Sparse linear regression whose support is one of several bases (Han et al. 2025, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_taskvec.lab.oracles import (
    bayes_mixture,
    lasso,
    least_squares,
    ridge,
    true_basis_ridge,
)
from transformer_lens_taskvec.lab.problems.base import (
    Batch,
    Problem,
    TaskPredictions,
    check_sizes,
    constant,
    draw_labels,
    normal,
    with_noise,
)


def _blocks(n_bases: int, rank: int) -> tuple[tuple[int, ...], ...]:
    """The first ``rank`` coordinates, the next ``rank``, and so on."""
    return tuple(tuple(range(k * rank, (k + 1) * rank)) for k in range(n_bases))


@dataclass(frozen=True)
class SparseLinearMixture(Problem):
    """Sparse linear regression whose support is one of several bases (section 3.3).

    ``y = w.x + e``, with ``w ~ N(0, I)`` zeroed outside the basis of the sequence and
    ``e ~ N(0, noise_variance)``. The default is the paper's main setting: four orthogonal bases of
    rank 4 in 16 dimensions.

    >>> SparseLinearMixture().tasks
    ('B1', 'B2', 'B3', 'B4')
    >>> SparseLinearMixture.small().bases
    ((0, 1), (2, 3), (4, 5), (6, 7))

    Attributes:
        dim: The dimension of an input.
        bases: The coordinates of each basis; bases may overlap and may differ in rank.
        noise_variance: The variance of ``e``.
        n_points: Pairs in a sequence, the query included (the paper's number of demonstrations).
    """

    dim: int = 16
    bases: tuple[tuple[int, ...], ...] = _blocks(4, 4)
    noise_variance: float = 0.01
    n_points: int = 20

    def __post_init__(self) -> None:
        check_sizes(self.dim, self.n_points, self.noise_variance)
        if not self.bases:
            raise ValueError("bases is empty; give at least one basis")
        for basis in self.bases:
            if not basis or len(set(basis)) < len(basis):
                raise ValueError(f"basis {basis} must name at least one coordinate, each once")
            if not all(0 <= coordinate < self.dim for coordinate in basis):
                raise ValueError(
                    f"basis {basis} is out of range: dim is {self.dim}, so coordinates are 0 to "
                    f"{self.dim - 1}"
                )

    @classmethod
    def orthogonal(
        cls, n_bases: int, rank: int, *, noise_variance: float = 0.01, n_points: int = 20
    ) -> SparseLinearMixture:
        """Bases of equal rank that share no coordinate; ``orthogonal(6, 4)`` has 24 dimensions."""
        return cls(n_bases * rank, _blocks(n_bases, rank), noise_variance, n_points)

    @classmethod
    def overlapping(
        cls, *, noise_variance: float = 0.01, n_points: int = 20
    ) -> SparseLinearMixture:
        """Eight bases in two groups of four: within dimensions 0-7 and within 8-15 (App. E).

        In a group, each basis shares half of its coordinates with the next.
        """
        group = [tuple(sorted((2 * k + j) % 8 for j in range(4))) for k in range(4)]
        other = [tuple(8 + coordinate for coordinate in basis) for basis in group]
        return cls(16, tuple(group + other), noise_variance, n_points)

    @classmethod
    def small(cls, *, noise_variance: float = 0.01, n_points: int = 16) -> SparseLinearMixture:
        """Four orthogonal bases of rank 2 in 8 dimensions, which a laptop can learn."""
        return cls.orthogonal(4, 2, noise_variance=noise_variance, n_points=n_points)

    @property
    def tasks(self) -> tuple[str, ...]:
        """``("B1", "B2", ...)``."""
        return tuple(f"B{k + 1}" for k in range(len(self.bases)))

    def masks(self, device: torch.device | str = "cpu") -> Float[Tensor, "task dim"]:
        """One where a coordinate belongs to a basis, zero elsewhere."""
        return self._masks(torch.device(device)).clone()

    def _masks(self, device: torch.device) -> Float[Tensor, "task dim"]:
        rows = (tuple(float(i in basis) for i in range(self.dim)) for basis in self.bases)
        return constant(tuple(rows), device)

    def sample(
        self,
        batch_size: int,
        generator: torch.Generator,
        *,
        labels: Int[Tensor, " batch"] | None = None,
    ) -> Batch:
        """As for :meth:`Problem.sample`."""
        labels = draw_labels(batch_size, len(self.bases), generator, labels)
        xs = normal(generator, batch_size, self.n_points, self.dim)
        weights = normal(generator, batch_size, self.dim) * self._masks(xs.device)[labels]
        clean = einsum(xs, weights, "batch point dim, batch dim -> batch point")
        return Batch(xs, with_noise(clean, self.noise_variance, generator), labels)

    def oracles(self, batch: Batch) -> dict[str, Float[Tensor, "batch point"]]:
        """Least squares, ridge, LASSO, ridge on the true basis, and the Bayes-optimal predictor.

        Ridge has the best penalty, the noise variance divided by the mean variance of a weight.
        Without noise there is no posterior over bases, and the last two are left out.
        """
        xs, ys, bases, noise = batch.xs, batch.ys, self.bases, self.noise_variance
        mean_rank = sum(len(basis) for basis in bases) / len(bases)
        found = {
            "least squares": least_squares(xs, ys),
            "ridge": ridge(xs, ys, penalty=noise * self.dim / mean_rank or 0.01),
            "lasso": lasso(xs, ys),
        }
        if noise > 0:
            known = true_basis_ridge(xs, ys, batch.labels, bases=bases, noise_variance=noise)
            inferred = bayes_mixture(xs, ys, bases=bases, noise_variance=noise)
            found |= {"true basis": known, "Bayes mixture": inferred.prediction}
        return found

    def posterior(self, batch: Batch) -> Float[Tensor, "batch point task"]:
        """As for :meth:`Problem.posterior`; without noise it is not defined."""
        noise = self.noise_variance
        found = bayes_mixture(batch.xs, batch.ys, bases=self.bases, noise_variance=noise)
        return found.probabilities

    def by_task(self, batch: Batch) -> TaskPredictions:
        """As for :meth:`Problem.by_task`; without noise it is not defined."""
        noise = self.noise_variance
        found = bayes_mixture(batch.xs, batch.ys, bases=self.bases, noise_variance=noise)
        return TaskPredictions(found.by_basis, found.variances)
