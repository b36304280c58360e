"""Ending a training before its last step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class EarlyStopping:
    """When a training ends before its last step, by the late loss at its evaluations.

    The late loss is the mean over tasks of the loss at a problem's late points; of the toy model,
    of its NLL. Evaluations are about evenly spaced in the logarithm of the step: of 40, five in a
    row take the training to 2.4 times as many steps.

    Attributes:
        patience: Training ends after so many evaluations in a row without a lower loss; None if it
            never ends for that reason.
        min_delta: How far below the lowest loss so far a loss must be to count as lower.
        target: Training ends at a loss of at most this; None if it never ends for that reason.
        after: Evaluations before this step do not count. Many runs begin with a plateau.

    Raises:
        ValueError: If neither ``patience`` nor ``target`` is given, or a number is out of range.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> stop = lab.EarlyStopping(patience=2, min_delta=0.01)
        >>> stop.reason([0, 10, 20, 30], [1.0, 0.5, 0.496, 0.497])
        'no late loss more than 0.01 below 0.5 in 2 evaluations'
        >>> stop.reason([0, 10, 20, 30], [1.0, 0.5, 0.496, 0.4]) is None
        True
    """

    patience: int | None = None
    min_delta: float = 0.0
    target: float | None = None
    after: int = 0

    def __post_init__(self) -> None:
        if self.patience is None and self.target is None:
            raise ValueError("patience and target are both None; give at least one of them")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be at least 1, got {self.patience}")
        for name in ("min_delta", "after"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def reason(self, steps: Sequence[int], losses: Sequence[float]) -> str | None:
        """Why a training ends at its last evaluation, or None if it does not.

        Args:
            steps: The steps of all evaluations so far.
            losses: Their late losses.
        """
        counted = [loss for step, loss in zip(steps, losses, strict=True) if step >= self.after]
        if not counted:
            return None
        if self.target is not None and counted[-1] <= self.target:
            return f"late loss {counted[-1]:.4g}, at most the target of {self.target:.4g}"
        if self.patience is None:
            return None
        lowest, since = math.inf, 0
        for loss in counted:
            lower = loss < lowest - self.min_delta
            lowest, since = (loss, 0) if lower else (lowest, since + 1)
        if since < self.patience:
            return None
        return (
            f"no late loss more than {self.min_delta:.4g} below {lowest:.4g} in "
            f"{self.patience} evaluations"
        )
