"""Regression on a representation: ``y`` is linear in ``Phi(x)``, not in ``x`` (Guo et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import leaky_relu

from transformer_lens_taskvec.lab.oracles import MixturePosterior, bayes_mixture, ridge
from transformer_lens_taskvec.lab.problems.base import (
    QUICK,
    Batch,
    Finding,
    Problem,
    TaskPredictions,
    check_sizes,
    draw_labels,
    normal,
    with_noise,
)
from transformer_lens_taskvec.lab.problems.represented.finding import finding_of
from transformer_lens_taskvec.lab.problems.represented.pasting import LinearVectors

_SLOPE = 0.01
_MOST_LAYERS = 4
_DRAWS = 4096
_PENALTIES = tuple(4.0**power for power in range(-4, 5))


@dataclass(frozen=True)
class Represented(Problem):
    """Linear regression on a fixed representation of the input (Guo et al. 2024, section 5.1).

    ``y = w.Phi(x) + e`` with ``x ~ N(0, I)``, ``w ~ N(0, weight_variance I)`` drawn for every
    sequence, and ``e ~ N(0, noise_variance)``. ``Phi`` is a network of random orthogonal matrices,
    each followed by a leaky ReLU of slope 0.01, the same in all sequences. With several maps each
    sequence is of one of them, and the representation is the task. The paper has 20 dimensions,
    ``w ~ N(0, I / 20)`` and 1 to 4 layers.

    Attributes:
        n_layers_of_phi: Layers of each map, 1 to 4.
        n_maps: How many maps there are; one per latent task.
        dim: The dimension of an input and of its representation.
        noise_variance: The variance of ``e``.
        weight_variance: The variance of each of the weights ``w``.
        n_points: Pairs in a sequence, the query included.
        map_seed: Seed of the maps.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.represented import Represented
        >>> problem = Represented()
        >>> problem.tasks, problem.sample(4, torch.Generator()).ys.shape
        (('Phi1', 'Phi2', 'Phi3'), torch.Size([4, 16]))
        >>> problem.represent(torch.randn(4, 16, 6)).shape  # by every map
        torch.Size([4, 16, 3, 6])
    """

    n_layers_of_phi: int = 2
    n_maps: int = 3
    dim: int = 6
    noise_variance: float = 0.01
    weight_variance: float = 1.0
    n_points: int = 16
    map_seed: int = 0

    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            **QUICK,
            "n_layers": 5,
            "n_heads": 4,
            "d_model": 64,
            "targets": "expected",
            "steps": 6_000,
            "batch_size": 48,
            "n_checkpoints": 24,
        }
    )

    def __post_init__(self) -> None:
        check_sizes(self.dim, self.n_points, self.noise_variance)
        if not 1 <= self.n_layers_of_phi <= _MOST_LAYERS:
            raise ValueError(
                f"n_layers_of_phi must be in [1, {_MOST_LAYERS}], got {self.n_layers_of_phi}"
            )
        if self.n_maps < 1:
            raise ValueError(f"n_maps must be at least 1, got {self.n_maps}")
        if self.weight_variance <= 0:
            raise ValueError(f"weight_variance must be positive, got {self.weight_variance}")

    @classmethod
    def single(
        cls, *, n_layers_of_phi: int = 2, dim: int = 6, n_points: int = 16, map_seed: int = 0
    ) -> Represented:
        """One map, as in most of the paper: no task to tell, a representation to find.

        >>> Represented.single().tasks
        ('Phi1',)
        """
        return cls(n_layers_of_phi, 1, dim, n_points=n_points, map_seed=map_seed)

    @property
    def tasks(self) -> tuple[str, ...]:
        """``("Phi1", "Phi2", ...)``."""
        return tuple(f"Phi{k + 1}" for k in range(self.n_maps))

    @cached_property
    def matrices(self) -> Float[Tensor, "map layer dim dim"]:
        """The orthogonal matrices of the maps, drawn uniformly with ``map_seed``."""
        fixed = torch.Generator().manual_seed(self.map_seed)
        matrices = torch.empty(self.n_maps, self.n_layers_of_phi, self.dim, self.dim)
        for matrix in matrices.flatten(0, 1):
            torch.nn.init.orthogonal_(matrix, generator=fixed)
        return matrices

    def represent(
        self, xs: Float[Tensor, "batch point dim"]
    ) -> Float[Tensor, "batch point map dim"]:
        """``Phi(x)`` by every map."""
        hidden = xs[:, :, None].expand(-1, -1, self.n_maps, -1)
        for layer in self.matrices.to(xs).unbind(1):
            turned = einsum(
                layer, hidden, "map out dim, batch point map dim -> batch point map out"
            )
            hidden = leaky_relu(turned, _SLOPE)
        return hidden

    def own(self, batch: Batch) -> Float[Tensor, "batch point dim"]:
        """``Phi(x)`` by each sequence's own map."""
        rows = torch.arange(len(batch.labels), device=batch.xs.device)
        return self.represent(batch.xs)[rows, :, batch.labels]

    def sample(
        self,
        batch_size: int,
        generator: torch.Generator,
        *,
        labels: Int[Tensor, " batch"] | None = None,
    ) -> Batch:
        """As for :meth:`Problem.sample`."""
        labels = draw_labels(batch_size, self.n_maps, generator, labels)
        xs = normal(generator, batch_size, self.n_points, self.dim)
        weights = math.sqrt(self.weight_variance) * normal(generator, batch_size, self.dim)
        empty = Batch(xs, xs.new_zeros(xs.shape[:2]), labels)
        clean = einsum(self.own(empty), weights, "batch point dim, batch dim -> batch point")
        return Batch(xs, with_noise(clean, self.noise_variance, generator), labels)

    def oracles(self, batch: Batch) -> dict[str, Float[Tensor, "batch point"]]:
        """Ridge on ``x``, on the true ``Phi(x)``, on all maps at once, and the exact Bayes mixture.

        Ridge on ``Phi(x)`` is told the map if there are several; its penalty makes it the posterior
        mean. With one map it is the optimum, and the last two are left out, as they would be equal
        to it. Ridge on ``x`` has the best of nine penalties, from 1/256 to 256. Ridge on all maps
        knows them and does not select.
        """
        found = {
            "ridge on x": ridge(batch.xs, batch.ys, penalty=self._raw_penalty),
            "ridge on Phi(x)": ridge(self.own(batch), batch.ys, penalty=self._penalty),
        }
        if self.n_maps > 1:
            found["ridge on all maps"] = ridge(
                rearrange(self.represent(batch.xs), "batch point map dim -> batch point (map dim)"),
                batch.ys,
                penalty=self.n_maps * self._penalty,
            )
            if self.noise_variance > 0:
                found["Bayes mixture"] = self._mixture(batch).prediction
        return found

    def posterior(self, batch: Batch) -> Float[Tensor, "batch point task"]:
        """As for :meth:`Problem.posterior`: which map it is; without noise it is not defined."""
        return self._mixture(batch).probabilities

    def by_task(self, batch: Batch) -> TaskPredictions:
        """As for :meth:`Problem.by_task`: ridge on each map; without noise it is not defined."""
        found = self._mixture(batch)
        return TaskPredictions(found.by_basis, found.variances)

    def swapped_at(self, point: int) -> tuple[int, ...]:
        """The query: a model tells the map there, having regressed; no ``y`` before it holds it."""
        return (self.query_at(point),)

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        """What :func:`probe_targets` looks for in a model, by name (section 5.1).

        ``x``, ``Phi(x)`` of the sequence's map, the best prediction that the pairs before the point
        allow, and ``y``. Of several maps also ``Phi(x)`` by all of them, which a model has that
        computes them side by side, and ridge on each of them, which one has that regresses on all
        and selects afterwards.
        """
        predicted = self.oracles(batch)
        best = predicted.get("Bayes mixture", predicted["ridge on Phi(x)"])
        found = {"x": batch.xs, "Phi(x)": self.own(batch), "prediction": best, "y": batch.ys}
        if self.n_maps > 1:
            maps = self.represent(batch.xs)
            fits = [ridge(phi, batch.ys, penalty=self._penalty) for phi in maps.unbind(2)]
            found["every map's Phi(x)"] = rearrange(
                maps, "batch point map dim -> batch point (map dim)"
            )
            found["every map's ridge"] = torch.stack(fits, dim=-1)
        return found

    def linear_vectors(self) -> LinearVectors:
        """Linear regression on Gaussian vectors with the principal second moments of ``Phi(x)``.

        Of several maps it has the mean of theirs. They are far from equal: at the second layer the
        first is about twice the sum of the others, so that regression on a vector of
        equal variances would be a harder problem than any that the model was trained on.
        """
        draws = normal(torch.Generator().manual_seed(self.map_seed), 1, _DRAWS, self.dim)
        vectors = self.represent(draws)[0]
        moments = einsum(vectors, vectors, "draw map row, draw map column -> map row column")
        spectrum = torch.linalg.eigvalsh(moments.double() / _DRAWS).mean(0).clamp(min=1e-6)
        variances = tuple(spectrum.flip(0).tolist())
        return LinearVectors(
            self.dim, variances, self.noise_variance, self.weight_variance, self.n_points
        )

    def finding(self, run: Any) -> Finding:
        """Probes by layer, the error against the oracles, and pasting; of several maps also TD."""
        return finding_of(run, self)

    @property
    def _penalty(self) -> float:
        """Of ridge on ``Phi(x)``: the optimum, or 1e-6 without noise."""
        return self.noise_variance / self.weight_variance or 1e-6

    @cached_property
    def _raw_penalty(self) -> float:
        """Of ridge on ``x``: what ``x`` does not explain is noise to it, of unknown variance."""
        batch = self.sample(250, torch.Generator().manual_seed(self.map_seed))

        def late_loss(penalty: float) -> float:
            errors = ridge(batch.xs, batch.ys, penalty=penalty) - batch.ys
            return float(errors[:, self.late_from :].square().mean())

        return min(_PENALTIES, key=late_loss)

    def _mixture(self, batch: Batch) -> MixturePosterior:
        """Sparse regression on all maps' representations, of which one block has weights."""
        scaled = math.sqrt(self.weight_variance) * self.represent(batch.xs)
        blocks = torch.arange(self.n_maps * self.dim).view(self.n_maps, self.dim).tolist()
        return bayes_mixture(
            rearrange(scaled, "batch point map dim -> batch point (map dim)"),
            batch.ys,
            bases=blocks,
            noise_variance=self.noise_variance,
        )
