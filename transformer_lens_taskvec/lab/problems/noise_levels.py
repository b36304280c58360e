"""Linear regression at several noise levels, of which each sequence has one (Bai et al. 2023).

Where the noise level is known, the best predictor is ridge regression, and each level has a penalty
of its own. The levels are the latent tasks: a model that is as good at all of them must infer the
level from the sequence ("Transformers as Statisticians", 2306.04637, section 4.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_taskvec.lab.oracles import MixturePosterior, noise_mixture
from transformer_lens_taskvec.lab.problems.base import (
    Batch,
    Problem,
    check_sizes,
    draw_labels,
    normal,
)

_LEAST = 1e-3
"""What a level of 0 counts as in oracles: the posterior of no noise at all has no density."""


@dataclass(frozen=True)
class NoisyLinear(Problem):
    """Linear regression, ``y = w.x + sigma e``, with one of several noise levels per sequence.

    ``w ~ N(0, I / dim)``, ``x ~ N(0, I)`` and ``e ~ N(0, 1)``, so that an output has a variance of
    ``1 + sigma^2``.

    >>> NoisyLinear((0.1, 0.25, 0.5, 1.0)).tasks
    ('sigma 0.1', 'sigma 0.25', 'sigma 0.5', 'sigma 1')

    Attributes:
        sigmas: The noise levels: standard deviations of the noise on ``y``.
        dim: The dimension of an input.
        n_points: Pairs in a sequence, the query included.
    """

    sigmas: tuple[float, ...] = (0.1, 0.5)
    dim: int = 5
    n_points: int = 11

    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            "n_layers": 3,
            "n_heads": 4,
            "d_model": 64,
            "init": "fan_in",
            "steps": 8_000,
            "batch_size": 64,
            "optimizer": "muon",
            "learning_rate": 1e-3,
            "betas": (0.9, 0.999),
            "muon_learning_rate": 3e-3,
            "warmup": 200,
            "schedule": "cosine",
            "n_checkpoints": 30,
        }
    )

    def __post_init__(self) -> None:
        check_sizes(self.dim, self.n_points, 0.0)
        if not self.sigmas or min(self.sigmas) < 0 or len(set(self.sigmas)) < len(self.sigmas):
            raise ValueError(
                f"sigmas is {self.sigmas}; give at least one noise level, each once, 0 or higher"
            )

    @classmethod
    def published(cls) -> NoisyLinear:
        """The paper's setting: five levels in 20 dimensions, with 20 demonstrations."""
        return cls((0.0, 0.1, 0.25, 0.5, 1.0), dim=20, n_points=21)

    @property
    def tasks(self) -> tuple[str, ...]:
        """``("sigma 0.1", "sigma 0.5")``."""
        return tuple(f"sigma {sigma:g}" for sigma in self.sigmas)

    @property
    def penalties(self) -> tuple[float, ...]:
        """The penalty of ridge regression that is best at each level, ``dim sigma^2``."""
        return tuple(self.dim * variance for variance in self._variances)

    def sample(
        self,
        batch_size: int,
        generator: torch.Generator,
        *,
        labels: Int[Tensor, " batch"] | None = None,
    ) -> Batch:
        """As for :meth:`Problem.sample`."""
        labels = draw_labels(batch_size, len(self.sigmas), generator, labels)
        xs = normal(generator, batch_size, self.n_points, self.dim)
        weights = normal(generator, batch_size, self.dim) / self.dim**0.5
        clean = einsum(xs, weights, "batch point dim, batch dim -> batch point")
        levels = torch.tensor(self.sigmas, device=xs.device)[labels]
        noise = normal(generator, *clean.shape) * rearrange(levels, "batch -> batch 1")
        return Batch(xs, clean + noise, labels)

    @property
    def _variances(self) -> tuple[float, ...]:
        return tuple(max(sigma, _LEAST) ** 2 for sigma in self.sigmas)
