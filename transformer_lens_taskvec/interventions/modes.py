"""Modes: how a vector is written into an activation.

On the rows ``a`` of an activation, with ``v`` the vector times its scale::

    replace  a' = v                       add      a' = a + v
    zero     a' = 0                       project  a' = a - (a . u) u,  u = v / |v|
    any callable f                        a' = f(a, v)

A relative strength makes ``v`` the vector's direction times its scale times ``|a|``, for each row
its own.

To add a mode, write one function and one entry of :data:`MODES` here, or give :func:`inject` a
callable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

Rewrite = Callable[[Float[Tensor, "row d"], Float[Tensor, " d"]], Float[Tensor, "row d"]]
Mode = str | Rewrite


def _replace(
    rows: Float[Tensor, "row d"], vector: Float[Tensor, "*each d"]
) -> Float[Tensor, "row d"]:
    return vector.to(rows).expand_as(rows)


def _add(rows: Float[Tensor, "row d"], vector: Float[Tensor, "*each d"]) -> Float[Tensor, "row d"]:
    return rows + vector.to(rows)


def _project(rows: Float[Tensor, "row d"], vector: Float[Tensor, " d"]) -> Float[Tensor, "row d"]:
    unit = torch.nn.functional.normalize(vector.float(), dim=0)
    along = einsum(rows.float(), unit, "row d, d -> row")
    return (rows.float() - einsum(along, unit, "row, d -> row d")).to(rows.dtype)


MODES: Mapping[str, Rewrite] = {"replace": _replace, "add": _add, "project": _project}
"""The named modes that write a vector; ``"zero"`` writes none."""


def rewritten(
    mode: Mode,
    rows: Float[Tensor, "row d"],
    vector: Float[Tensor, " d"],
    scale: float,
    *,
    relative: bool,
    at: str,
) -> Float[Tensor, "row d"]:
    """Return rows of an activation with a vector written in a mode.

    Args:
        mode: One that writes a vector.
        rows: The activation.
        vector: The vector.
        scale: Its factor.
        relative: Whether the factor is in units of each row's norm.
        at: The name of the hook point.

    Raises:
        ValueError: If a callable mode returns another shape.

    Example:
        >>> import torch
        >>> rows, vector = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([7.0, 0.0])
        >>> rewritten("add", rows, vector, 2.0, relative=True, at="resid_post")
        tensor([[13.,  4.],
                [ 2.,  1.]])
    """
    if not relative:
        return _rewritten(mode, rows, vector * scale, at)
    direction = scale * torch.nn.functional.normalize(vector.float(), dim=0)
    each = einsum(rows.float().norm(dim=-1), direction, "row, d -> row d")
    if isinstance(mode, str):
        return MODES[mode](rows, each)
    pairs = zip(rows.split(1), each, strict=True)
    return torch.cat([_rewritten(mode, row, own, at) for row, own in pairs])


def _rewritten(
    mode: Mode, rows: Float[Tensor, "row d"], vector: Float[Tensor, " d"], at: str
) -> Float[Tensor, "row d"]:
    if isinstance(mode, str):
        return MODES[mode](rows, vector)
    edited: Any = mode(rows, vector.to(rows.dtype))
    if not isinstance(edited, Tensor) or edited.shape != rows.shape:
        shape = tuple(edited.shape) if isinstance(edited, Tensor) else type(edited).__name__
        raise ValueError(
            f"the callable mode at {at} must return the shape it got, {tuple(rows.shape)}; it "
            f"returned {shape}"
        )
    return torch.as_tensor(edited)


@dataclass(frozen=True, eq=False)
class InSubspace:
    """A mode for :func:`inject`: replace within a subspace, and leave the rest unchanged.

    ``a' = a + P (v - a)``, with ``P`` the projection onto the subspace.
    :meth:`TaskVectors.subspace` gives the subspace in which the tasks' means differ, so that it
    changes a prompt's task and keeps its query.

    Attributes:
        directions: An orthonormal basis, ``[rank, d]``.
    """

    directions: Float[Tensor, "rank d"]

    def __call__(
        self, activation: Float[Tensor, "row d"], vector: Float[Tensor, " d"]
    ) -> Float[Tensor, "row d"]:
        """Return the activation with its part in the subspace replaced by the vector's."""
        directions = self.directions.to(activation)
        inside = einsum(vector - activation, directions, "row d, rank d -> row rank")
        return activation + einsum(inside, directions, "row rank, rank d -> row d")


@dataclass(frozen=True)
class KeepNorm:
    """A mode for :func:`inject`: turn an activation towards a vector, and keep its length.

    ``a' = |a| w / |w|`` with ``w = a / |a| + (1 + max(0, cos(a, -v))) v``: an activation that
    points away from the vector is turned further (Liu et al. 2023, in their code). The vector's
    length, after scaling, says how far: it is added to an activation of length one.

    Example:
        >>> import torch
        >>> edit = KeepNorm()
        >>> edit(torch.tensor([[3.0, 4.0], [0.0, -5.0]]), torch.tensor([0.0, 1.0]))
        tensor([[1.5811, 4.7434],
                [0.0000, 5.0000]])
    """

    def __call__(
        self, activation: Float[Tensor, "row d"], vector: Float[Tensor, " d"]
    ) -> Float[Tensor, "row d"]:
        """Return activations of the same lengths, turned towards the vector."""
        rows, towards = activation.float(), vector.float()
        away = torch.nn.functional.cosine_similarity(rows, -towards, dim=-1).clamp(min=0)
        step = einsum(1 + away, towards, "row, d -> row d")
        turned = torch.nn.functional.normalize(
            torch.nn.functional.normalize(rows, dim=-1) + step, dim=-1
        )
        return torch.as_tensor(rows.norm(dim=-1, keepdim=True) * turned).to(activation.dtype)


@dataclass(frozen=True, eq=False)
class AddMapped:
    """A mode for :func:`inject`: add the vector, and what a linear map makes of the activation.

    ``a' = a + v + (a - m) R^T W``, so that ``v`` is added where the activation is ``m``. The map
    ``R^T W`` has at most as many dimensions as it has rows.

    Attributes:
        mean: ``m``, ``[d]``.
        reads: ``R``, ``[rank, d]``.
        writes: ``W``, ``[rank, d]``.

    Example:
        >>> import torch
        >>> edit = AddMapped(torch.ones(2), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]]))
        >>> edit(torch.tensor([[1.0, 1.0], [2.0, 1.0]]), torch.tensor([0.5, 0.0]))
        tensor([[1.5000, 1.0000],
                [2.5000, 4.0000]])
    """

    mean: Float[Tensor, " d"]
    reads: Float[Tensor, "rank d"]
    writes: Float[Tensor, "rank d"]

    def __call__(
        self, activation: Float[Tensor, "row d"], vector: Float[Tensor, " d"]
    ) -> Float[Tensor, "row d"]:
        """Return the activation with the vector and its mapped difference from the mean added."""
        rows = activation.float()
        mean, reads, writes = (of.to(rows) for of in (self.mean, self.reads, self.writes))
        read = einsum(rows - mean, reads, "row d, rank d -> row rank")
        mapped = einsum(read, writes, "row rank, rank d -> row d")
        return (rows + vector.float() + mapped).to(activation.dtype)
