"""Modes: how a vector is written into an activation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

Mode = str | Callable[[Float[Tensor, "row d"], Float[Tensor, " d"]], Float[Tensor, "row d"]]


@dataclass(frozen=True, eq=False)
class InSubspace:
    """A mode for :func:`inject`: replace within a subspace, and leave the rest as it is.

    ``a' = a + P (v - a)``, with ``P`` the projection onto the subspace.
    :meth:`TaskVectors.subspace` gives the one in which the tasks' means differ, so that a prompt's
    task is changed and its query kept.

    Attributes:
        directions: An orthonormal basis, ``[rank, d]``.
    """

    directions: Float[Tensor, "rank d"]

    def __call__(
        self, activation: Float[Tensor, "row d"], vector: Float[Tensor, " d"]
    ) -> Float[Tensor, "row d"]:
        """The activation with its part in the subspace replaced by the vector's."""
        directions = self.directions.to(activation)
        return activation + (vector - activation) @ directions.T @ directions
