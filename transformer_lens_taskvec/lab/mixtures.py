"""Mixtures of in-context regression tasks: who draws the sequences that the lab's models learn.

A sequence is ``x_1, y_1, x_2, y_2, ...`` with ``x_i ~ N(0, I)`` and ``y_i = f(x_i) + noise``. The
function ``f`` is drawn anew for every sequence out of one of several families, and which family it
was is the *latent task*: nothing in the sequence names it (Han et al. 2025, section 3.3, App. D-F).

A family of one's own is a function, and a mixture of such is a :class:`RegressionFamilies`::

    def cosine(xs, generator):  # [batch, point, dim] -> [batch, point]
        w = torch.randn(xs.shape[0], xs.shape[2], 1, generator=generator, device=xs.device)
        return torch.cos(xs @ w).squeeze(-1)

    mixture = RegressionFamilies({"linear": linear, "cosine": cosine}, dim=8)

Anything else that has the members of :class:`Mixture` can be trained on as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

Family = Callable[[Float[Tensor, "batch point dim"], torch.Generator], Float[Tensor, "batch point"]]
"""Draws one function a sequence and applies it to the sequence's inputs, without noise."""


@dataclass(frozen=True)
class Batch:
    """Sequences of one mixture.

    Attributes:
        xs: Inputs, ``[batch, point, dim]``.
        ys: Noisy outputs, ``[batch, point]``.
        labels: The latent task of each sequence, an index into the mixture's ``tasks``.

    Example:
        >>> import torch
        >>> from transformer_lens_taskvec import lab
        >>> mixture = lab.SparseLinearMixture.small()
        >>> batch = mixture.sample(4, torch.Generator().manual_seed(0))
        >>> batch.xs.shape, batch.ys.shape, batch.labels.shape
        (torch.Size([4, 16, 8]), torch.Size([4, 16]), torch.Size([4]))
    """

    xs: Float[Tensor, "batch point dim"]
    ys: Float[Tensor, "batch point"]
    labels: Int[Tensor, " batch"]


@runtime_checkable
class Mixture(Protocol):
    """What training and evaluation need of a mixture.

    Any frozen dataclass that has these may be trained on: ``tasks`` are the names of the latent
    tasks, ``dim`` is the dimension of an input, ``n_points`` the pairs in a sequence, and
    ``sample`` draws sequences, of given tasks where ``labels`` says so.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> mixture = lab.SparseLinearMixture.small()
        >>> isinstance(mixture, lab.Mixture), mixture.tasks, mixture.dim, mixture.n_points
        (True, ('B1', 'B2', 'B3', 'B4'), 8, 16)
    """

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the latent tasks."""
        ...

    @property
    def dim(self) -> int:
        """The dimension of an input."""
        ...

    @property
    def n_points(self) -> int:
        """Pairs (x, y) in a sequence."""
        ...

    def sample(
        self,
        batch_size: int,
        generator: torch.Generator,
        *,
        labels: Int[Tensor, " batch"] | None = None,
    ) -> Batch:
        """Draw sequences, on the generator's device; latent tasks uniformly unless given."""
        ...


def _blocks(n_bases: int, rank: int) -> tuple[tuple[int, ...], ...]:
    """The first ``rank`` coordinates, the next ``rank``, and so on."""
    return tuple(tuple(range(k * rank, (k + 1) * rank)) for k in range(n_bases))


@dataclass(frozen=True)
class SparseLinearMixture:
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
        n_points: Pairs in a sequence: the paper's number of demonstrations, the last of which is
            the query.
    """

    dim: int = 16
    bases: tuple[tuple[int, ...], ...] = _blocks(4, 4)
    noise_variance: float = 0.01
    n_points: int = 20

    def __post_init__(self) -> None:
        _check_sizes(self.dim, self.n_points, self.noise_variance)
        if not self.bases:
            raise ValueError("bases is empty; give at least one basis")
        for basis in self.bases:
            if not basis or len(set(basis)) < len(basis):
                raise ValueError(f"basis {basis} must name at least one coordinate, each once")
            if not all(0 <= coordinate < self.dim for coordinate in basis):
                raise ValueError(f"basis {basis} leaves the {self.dim} dimensions of dim")

    @classmethod
    def orthogonal(
        cls, n_bases: int, rank: int, *, noise_variance: float = 0.01, n_points: int = 20
    ) -> SparseLinearMixture:
        """``n_bases`` bases of one rank that share no coordinate; ``orthogonal(6, 4)`` is D 24."""
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
        masks = torch.zeros(len(self.bases), self.dim)
        for k, basis in enumerate(self.bases):
            masks[k, list(basis)] = 1.0
        return masks.to(device)

    def sample(
        self,
        batch_size: int,
        generator: torch.Generator,
        *,
        labels: Int[Tensor, " batch"] | None = None,
    ) -> Batch:
        """Draw sequences.

        Args:
            batch_size: Number of sequences.
            generator: Source of randomness; the batch is made on its device.
            labels: The basis of each sequence; drawn uniformly by default.

        Returns:
            The sequences.

        Raises:
            ValueError: If ``labels`` does not have ``batch_size`` entries.
        """
        labels = _labels(batch_size, len(self.bases), generator, labels)
        xs = _normal(generator, batch_size, self.n_points, self.dim)
        weights = _normal(generator, batch_size, self.dim) * self.masks(xs.device)[labels]
        clean = torch.einsum("bpd,bd->bp", xs, weights)
        return Batch(xs, _with_noise(clean, self.noise_variance, generator), labels)


def linear(
    xs: Float[Tensor, "batch point dim"], generator: torch.Generator
) -> Float[Tensor, "batch point"]:
    """``w.x`` with ``w ~ N(0, I)``.

    Args:
        xs: Inputs, ``[batch, point, dim]``.
        generator: Source of randomness, on the device of ``xs``.

    Returns:
        Outputs without noise, ``[batch, point]``.

    Example:
        >>> import torch
        >>> from transformer_lens_taskvec import lab
        >>> xs = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
        >>> lab.linear(xs, torch.Generator().manual_seed(0)).shape
        torch.Size([2, 5])
    """
    weights = _normal(generator, xs.shape[0], xs.shape[2])
    return torch.einsum("bpd,bd->bp", xs, weights)


@dataclass(frozen=True)
class SparseLinear:
    """``w.x`` with all but ``rank`` coordinates of ``w``, chosen anew each time, set to zero.

    Attributes:
        rank: How many coordinates are kept.

    Example:
        >>> import torch
        >>> from transformer_lens_taskvec import lab
        >>> xs = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
        >>> lab.SparseLinear(rank=2)(xs, torch.Generator().manual_seed(0)).shape
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
        weights = _normal(generator, xs.shape[0], xs.shape[2])
        order = torch.rand(weights.shape, generator=generator, device=generator.device)
        kept = order.argsort(-1).argsort(-1) < self.rank
        return torch.einsum("bpd,bd->bp", xs, weights * kept)


@dataclass(frozen=True)
class LeakyReLU:
    """``leaky_relu(w.x)`` with ``w ~ N(0, I)``.

    Attributes:
        slope: Of the negative part.

    Example:
        >>> import torch
        >>> from transformer_lens_taskvec import lab
        >>> xs = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
        >>> ys = lab.LeakyReLU(slope=0.0)(xs, torch.Generator().manual_seed(0))
        >>> bool((ys >= 0).all())
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
    """``(w.x)^2 / sqrt(2 dim)`` with ``w ~ N(0, I)``: about the variance of :func:`linear`.

    Args:
        xs: Inputs, ``[batch, point, dim]``.
        generator: Source of randomness, on the device of ``xs``.

    Returns:
        Outputs without noise, ``[batch, point]``.

    Example:
        >>> import torch
        >>> from transformer_lens_taskvec import lab
        >>> xs = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
        >>> bool((lab.quadratic(xs, torch.Generator().manual_seed(0)) >= 0).all())
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
        >>> import torch
        >>> from transformer_lens_taskvec import lab
        >>> family = lab.LinearOnRepresentation()
        >>> mixture = lab.RegressionFamilies({"representation": family}, dim=4)
        >>> mixture.sample(2, torch.Generator().manual_seed(0)).ys.shape
        torch.Size([2, 20])
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


def default_families() -> dict[str, Family]:
    """The families of App. F, in equal shares."""
    return {
        "linear": linear,
        "sparse linear": SparseLinear(),
        "leaky ReLU": LeakyReLU(),
        "quadratic": quadratic,
    }


@dataclass(frozen=True)
class RegressionFamilies:
    """A mixture of any families of functions, in equal shares (App. F).

    The default has the four families of the paper; ``{"linear": linear, "representation":
    LinearOnRepresentation()}`` is the pair of linear regression and linear regression on a fixed
    random representation.

    >>> mixture = RegressionFamilies({"sum": lambda xs, generator: xs.sum(-1)}, dim=3)
    >>> mixture.sample(2, torch.Generator().manual_seed(0)).ys.shape
    torch.Size([2, 20])

    Attributes:
        families: The functions that draw and apply each family, by name.
        dim: The dimension of an input.
        noise_variance: The variance of the noise on ``y``.
        n_points: Pairs in a sequence.
    """

    families: Mapping[str, Family] = field(default_factory=default_families)
    dim: int = 16
    noise_variance: float = 0.01
    n_points: int = 20

    def __post_init__(self) -> None:
        _check_sizes(self.dim, self.n_points, self.noise_variance)
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
        """Draw sequences.

        Every family is applied to every sequence and the one that is wanted is kept: it costs
        little beside a training step, and nothing has to wait for the device.

        Args:
            batch_size: Number of sequences.
            generator: Source of randomness; the batch is made on its device.
            labels: The family of each sequence; drawn uniformly by default.

        Returns:
            The sequences.

        Raises:
            ValueError: If ``labels`` does not have ``batch_size`` entries, or a family returns
                outputs of the wrong shape.
        """
        labels = _labels(batch_size, len(self.families), generator, labels)
        xs = _normal(generator, batch_size, self.n_points, self.dim)
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
        return Batch(xs, _with_noise(clean, self.noise_variance, generator), labels)


def balanced_labels(
    n_tasks: int, n_per_task: int, device: torch.device | str = "cpu"
) -> Int[Tensor, " batch"]:
    """``n_per_task`` of each label, in order: ``0, 0, ..., 1, 1, ...``.

    Args:
        n_tasks: How many labels there are.
        n_per_task: How many of each.
        device: Where to put them.

    Returns:
        Labels, ``[n_tasks * n_per_task]``.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> lab.balanced_labels(3, 2).tolist()
        [0, 0, 1, 1, 2, 2]
    """
    return torch.arange(n_tasks, device=device).repeat_interleave(n_per_task)


def _check_sizes(dim: int, n_points: int, noise_variance: float) -> None:
    if dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}")
    if n_points < 2:
        raise ValueError(f"n_points must be at least 2 (a demonstration, a query), got {n_points}")
    if noise_variance < 0:
        raise ValueError(f"noise_variance must not be negative, got {noise_variance}")


def _labels(
    batch_size: int, n_tasks: int, generator: torch.Generator, labels: Tensor | None
) -> Int[Tensor, " batch"]:
    if labels is None:
        return torch.randint(n_tasks, (batch_size,), generator=generator, device=generator.device)
    if labels.shape != (batch_size,):
        raise ValueError(f"labels must be [{batch_size}], batch_size; got {list(labels.shape)}")
    return labels.to(generator.device)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def _with_noise(clean: Tensor, variance: float, generator: torch.Generator) -> Tensor:
    return clean + math.sqrt(variance) * _normal(generator, *clean.shape)
