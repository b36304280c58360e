"""Mixtures of families of functions (Han et al. 2025, App. F)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_taskvec.lab.problems.base import (
    Batch,
    Family,
    Problem,
    check_sizes,
    draw_labels,
    fields_of,
    normal,
    restored,
    with_noise,
)


def linear(
    xs: Float[Tensor, "batch point dim"], generator: torch.Generator
) -> Float[Tensor, "batch point"]:
    """``w.x`` with ``w ~ N(0, I)``: outputs without noise, ``[batch, point]``.

    Args:
        xs: Inputs, ``[batch, point, dim]``.
        generator: Source of randomness, on the device of ``xs``.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> lab.linear(torch.randn(2, 5, 8), torch.Generator()).shape
        torch.Size([2, 5])
    """
    weights = normal(generator, xs.shape[0], xs.shape[2])
    return einsum(xs, weights, "batch point dim, batch dim -> batch point")


@dataclass(frozen=True)
class SparseLinear:
    """``w.x`` with all but ``rank`` coordinates of ``w`` set to zero, drawn for each sequence.

    Attributes:
        rank: How many coordinates are kept.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> lab.SparseLinear(rank=2)(torch.randn(2, 5, 8), torch.Generator()).shape
        torch.Size([2, 5])
    """

    rank: int = 4

    def __call__(
        self, xs: Float[Tensor, "batch point dim"], generator: torch.Generator
    ) -> Float[Tensor, "batch point"]:
        """Draw functions and apply them."""
        if not 1 <= self.rank <= xs.shape[2]:
            raise ValueError(
                f"rank must be in [1, {xs.shape[2]}], the inputs' dim; got {self.rank}"
            )
        weights = normal(generator, xs.shape[0], xs.shape[2])
        order = torch.rand(weights.shape, generator=generator, device=generator.device)
        kept = order.argsort(-1).argsort(-1) < self.rank
        return einsum(xs, weights * kept, "batch point dim, batch dim -> batch point")


@dataclass(frozen=True)
class LeakyReLU:
    """``leaky_relu(w.x)`` with ``w ~ N(0, I)``.

    Attributes:
        slope: Of the negative part.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> bool((lab.LeakyReLU(slope=0.0)(torch.randn(2, 5, 8), torch.Generator()) >= 0).all())
        True
    """

    slope: float = 0.5

    def __call__(
        self, xs: Float[Tensor, "batch point dim"], generator: torch.Generator
    ) -> Float[Tensor, "batch point"]:
        """Draw functions and apply them."""
        return torch.nn.functional.leaky_relu(linear(xs, generator), self.slope)


def quadratic(
    xs: Float[Tensor, "batch point dim"], generator: torch.Generator
) -> Float[Tensor, "batch point"]:
    """``(w.x)^2 / sqrt(2 dim)`` with ``w ~ N(0, I)``: on the scale of :func:`linear`.

    Args:
        xs: Inputs, ``[batch, point, dim]``.
        generator: Source of randomness, on the device of ``xs``.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> bool((lab.quadratic(torch.randn(2, 5, 8), torch.Generator()) >= 0).all())
        True
    """
    return linear(xs, generator).square() / math.sqrt(2 * xs.shape[2])


@dataclass(frozen=True)
class LinearOnRepresentation:
    """``w.phi(x)``: linear on a random two-layer network that is the same in every sequence.

    ``phi(x) = tanh(B leaky_relu(A x / sqrt(dim)))`` with Gaussian ``A`` and ``B``, drawn once from
    ``seed``; ``w ~ N(0, I)`` is drawn for every sequence.

    Attributes:
        width: Units of each layer; None for as many as the inputs have dimensions.
        seed: Seed of ``A`` and ``B``.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> lab.LinearOnRepresentation()(torch.randn(2, 5, 8), torch.Generator()).shape
        torch.Size([2, 5])
    """

    width: int | None = None
    seed: int = 0

    def __call__(
        self, xs: Float[Tensor, "batch point dim"], generator: torch.Generator
    ) -> Float[Tensor, "batch point"]:
        """Draw functions and apply them."""
        return linear(self.represent(xs), generator)

    def represent(self, xs: Float[Tensor, "batch point dim"]) -> Float[Tensor, "batch point width"]:
        """``phi(x)``."""
        dim = xs.shape[-1]
        width = self.width or dim
        fixed = torch.Generator().manual_seed(self.seed)
        first = torch.randn(dim, width, generator=fixed).to(xs.device) / math.sqrt(dim)
        second = torch.randn(width, width, generator=fixed).to(xs.device) / math.sqrt(width)
        return torch.tanh(torch.nn.functional.leaky_relu(xs @ first) @ second * 2.0)


_OF_THE_PAPER: Mapping[str, Family] = {
    "linear": linear,
    "sparse linear": SparseLinear(),
    "leaky ReLU": LeakyReLU(),
    "quadratic": quadratic,
}


@dataclass(frozen=True)
class RegressionFamilies(Problem):
    """A mixture of any families of functions, in equal shares (App. F).

    Attributes:
        families: The functions that draw and apply each family, by name; by default the paper's.
        dim: The dimension of an input.
        noise_variance: The variance of the noise on ``y``.
        n_points: Pairs in a sequence.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> problem = lab.RegressionFamilies({"sum": lambda xs, generator: xs.sum(-1)}, dim=3)
        >>> problem.sample(2, torch.Generator()).ys.shape
        torch.Size([2, 20])
    """

    families: Mapping[str, Family] = field(default_factory=lambda: dict(_OF_THE_PAPER))
    dim: int = 16
    noise_variance: float = 0.01
    n_points: int = 20

    def __post_init__(self) -> None:
        check_sizes(self.dim, self.n_points, self.noise_variance)
        if not self.families:
            raise ValueError("families is empty; give at least one family")

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the families."""
        return tuple(self.families)

    def sample(
        self,
        batch_size: int,
        generator: torch.Generator,
        *,
        labels: Int[Tensor, " batch"] | None = None,
    ) -> Batch:
        """As for :meth:`Problem.sample`.

        Every family is applied to every sequence and the wanted outputs are kept. That costs little
        compared with a training step, and nothing has to wait for the device.
        """
        labels = draw_labels(batch_size, len(self.families), generator, labels)
        xs = normal(generator, batch_size, self.n_points, self.dim)
        outputs = []
        for name, family in self.families.items():
            ys = family(xs, generator)
            if ys.shape != xs.shape[:2]:
                raise ValueError(
                    f"family {name!r} returned shape {tuple(ys.shape)}; "
                    f"expected [batch, point], {tuple(xs.shape[:2])}"
                )
            outputs.append(ys)
        clean = torch.stack(outputs)[labels, torch.arange(batch_size, device=xs.device)]
        return Batch(xs, with_noise(clean, self.noise_variance, generator), labels)

    def to_json(self) -> dict[str, Any]:
        """All settings in the form of JSON; a family of your own is recorded by name only."""
        families = {name: _described(family) for name, family in self.families.items()}
        return {**super().to_json(), "families": families}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> RegressionFamilies:
        """As for :meth:`Problem.from_json`."""
        families = {name: _built_in(name, one) for name, one in fields["families"].items()}
        return cls(**{**fields, "families": families})


_BUILT_IN: Mapping[str, Any] = {
    family.__name__: family
    for family in (linear, quadratic, SparseLinear, LeakyReLU, LinearOnRepresentation)
}


def _described(family: Family) -> dict[str, Any]:
    """The JSON form of a family: its name, and the settings of one that is built in."""
    name = getattr(family, "__name__", type(family).__name__)
    known = _BUILT_IN.get(name)
    kind = "function" if known is family else "class" if known is type(family) else "own"
    return {kind: name, **fields_of(family)}


def _built_in(name: str, described: Mapping[str, Any]) -> Family:
    """The family that :func:`_described` described."""
    fields = dict(restored(described, f"the family {name!r}"))
    family: Family
    if "function" in fields:
        family = _BUILT_IN[fields["function"]]
    else:
        family = _BUILT_IN[fields.pop("class")](**fields)
    return family
