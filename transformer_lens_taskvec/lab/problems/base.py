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
from collections.abc import Callable
from dataclasses import dataclass
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
