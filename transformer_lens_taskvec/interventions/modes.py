"""Modes: how a vector is written into an activation.

On the rows ``a`` of an activation, with ``v`` the vector times its scale::

    replace  a' = v                       add      a' = a + v
    zero     a' = 0                       project  a' = a - (a . u) u,  u = v / |v|
    any callable f                        a' = f(a, v)

To add a mode, write one function and one entry of :data:`MODES` here, or give :func:`inject` a
callable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

Rewrite = Callable[[Float[Tensor, "row d"], Float[Tensor, " d"]], Float[Tensor, "row d"]]
Mode = str | Rewrite


def _replace(rows: Float[Tensor, "row d"], vector: Float[Tensor, " d"]) -> Float[Tensor, "row d"]:
    return vector.to(rows).expand_as(rows)


def _add(rows: Float[Tensor, "row d"], vector: Float[Tensor, " d"]) -> Float[Tensor, "row d"]:
    return rows + vector.to(rows)


def _project(rows: Float[Tensor, "row d"], vector: Float[Tensor, " d"]) -> Float[Tensor, "row d"]:
    unit = torch.nn.functional.normalize(vector.float(), dim=0)
    along = einsum(rows.float(), unit, "row d, d -> row")
    return (rows.float() - einsum(along, unit, "row, d -> row d")).to(rows.dtype)


MODES: Mapping[str, Rewrite] = {"replace": _replace, "add": _add, "project": _project}
"""The named modes that write a vector; ``"zero"`` writes none."""


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
