"""Classification by patterns: which of two patterns an input carries (Li et al. 2024).

An input is one of ``m1`` *relevant* patterns and a share of one of ``m2`` irrelevant ones::

    x = mu_j + kappa nu_k        all patterns orthogonal and of norm beta, |kappa| <= 1/2

A task ``(a, b)`` gives ``mu_a`` the output 1 and ``mu_b`` the output -1. Of the demonstrations a
share ``alpha / 2`` carries each of them; the rest carry other relevant patterns, of which the task
says nothing. A model can solve a task that it has never seen by finding a demonstration with the
query's pattern.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_taskvec.lab.problems.base import (
    QUICK,
    Batch,
    Finding,
    Problem,
    check_sizes,
    draw_labels,
)
from transformer_lens_taskvec.lab.problems.patterns.finding import patterns_finding

_RULED_OUT = -100.0
"""The log-probability of a pair that a task rules out; finite, so that sums of it have an order."""


@dataclass(frozen=True)
class PatternTasks(Problem):
    """Classification by one of two patterns (Li et al. 2024, "nonlinear transformers").

    The structure is that of the paper; what its summary leaves open is chosen here. Every
    demonstration draws its pattern by itself, the query carries ``mu_a`` or ``mu_b`` in equal
    shares, ``kappa`` is uniform in [-1/2, 1/2], and the outputs of patterns other than ``mu_a`` and
    ``mu_b`` are fair coins. Inputs and outputs alternate as in all problems of the lab, and the
    loss counts all points from ``counted_from`` on whose input carries ``mu_a`` or ``mu_b``.

    The training tasks are ``(j, j + s)`` for the steps ``s`` in ``shifts``, counted round the
    patterns, so that every pattern is positive in as many of them as it is negative in. With two
    shifts, a pattern and its output leave two tasks open: then what the query's token holds is more
    than its answer if the task can be read from it.

    Attributes:
        m1: Relevant patterns.
        m2: Irrelevant patterns.
        alpha: The share of demonstrations that carry one of the task's two patterns.
        shifts: The tasks' steps from the positive pattern to the negative one.
        n_points: Pairs in a sequence, the query included.
        counted_from: The first point that counts in the loss.
        beta: The norm of a pattern.
        dim: The dimension of an input; the first coordinate is the outputs', and each pattern has
            one of its own.
        mixing: The patterns in use as combinations of the ``m1`` relevant ones, ``[pattern, m1]``,
            each of norm 1 and with a sum of at least 1; empty for the relevant patterns themselves.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.patterns import PatternTasks
        >>> PatternTasks().tasks
        ('1/2', '2/3', '3/4', '4/1', '1/3', '2/4', '3/1', '4/2')
        >>> PatternTasks().new_tasks().tasks, PatternTasks().shifted().tasks
        (('1/4', '2/1', '3/2', '4/3'), ('1/2', '2/3', '3/1'))
    """

    m1: int = 4
    m2: int = 24
    alpha: float = 0.8
    shifts: tuple[int, ...] = (1, 2)
    n_points: int = 21
    counted_from: int = 4
    beta: float = 4.0
    dim: int = 32
    mixing: tuple[tuple[float, ...], ...] = ()

    loss_kind: ClassVar[str] = "hinge"
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            **QUICK,
            "n_layers": 3,
            "n_heads": 2,
            "d_model": 64,
            "steps": 1_000,
            "warmup": 50,
            "n_checkpoints": 24,
            "n_eval": 50,
        }
    )

    def __post_init__(self) -> None:
        check_sizes(self.dim, self.n_points, 0.0)
        if self.m1 < 3 or self.m2 < 1:
            raise ValueError(
                f"m1 must be at least 3 and m2 at least 1 (a task has two patterns, and there are "
                f"others); got {self.m1} and {self.m2}"
            )
        if self.dim < self.m1 + self.m2 + 1:
            raise ValueError(
                f"dim is {self.dim}; {self.m1} + {self.m2} patterns and the output need at least "
                f"{self.m1 + self.m2 + 1}"
            )
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha must be above 0 and at most 1, got {self.alpha}")
        if self.beta <= 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        if not 0 <= self.counted_from < self.n_points:
            raise ValueError(
                f"counted_from must be a point, 0 to {self.n_points - 1}; got {self.counted_from}"
            )
        self._check_mixing()
        allowed = range(1, self.n_patterns)
        if not self.shifts or not set(self.shifts) <= set(allowed):
            raise ValueError(
                f"shifts must be one or more of {list(allowed)}, the steps between "
                f"{self.n_patterns} patterns; got {self.shifts}"
            )
        if len(set(self.shifts)) < len(self.shifts):
            raise ValueError(f"shifts must differ, got {self.shifts}")

    def _check_mixing(self) -> None:
        if not self.mixing:
            return
        if len(self.mixing) < 3 or any(len(row) != self.m1 for row in self.mixing):
            raise ValueError(
                f"mixing must have at least 3 rows of m1 = {self.m1} numbers; got rows of "
                f"{[len(row) for row in self.mixing]}"
            )
        for row in self.mixing:
            if abs(math.hypot(*row) - 1) > 1e-4 or sum(row) < 1 - 1e-4:
                raise ValueError(
                    f"mixing has the row {row} of norm {math.hypot(*row):.3f} and sum "
                    f"{sum(row):.3f}; the norm must be 1 and the sum at least 1"
                )

    @classmethod
    def paper(cls) -> PatternTasks:
        """The paper's patterns, 6 relevant and 24 irrelevant, with the fewest tasks: 6 of 30."""
        return cls(m1=6, m2=24, shifts=(1,))

    def new_tasks(self) -> PatternTasks:
        """The same problem on the tasks held out: those of all other shifts.

        Raises:
            ValueError: If no task is held out.
        """
        others = tuple(s for s in range(1, self.n_patterns) if s not in self.shifts)
        if not others:
            raise ValueError(f"shifts {self.shifts} are all there are; no task is held out")
        return replace(self, shifts=others)

    def shifted(self, m1_new: int = 3, *, seed: int = 0) -> PatternTasks:
        """The problem on patterns that are combinations of the relevant ones (the paper's OOD).

        ``mu'_j = sum_i k_ji mu_i``: orthogonal, of the same norm, with ``sum_i k_ji`` equal to
        ``sqrt(m1 / m1_new)``, so at least the 1 that the paper's theorem asks for.

        Args:
            m1_new: The number of new patterns, 3 to ``m1``.
            seed: Seed of the combinations.

        Raises:
            ValueError: If there cannot be so many.
        """
        if not 3 <= m1_new <= self.m1:
            raise ValueError(f"m1_new must be 3 to m1 = {self.m1}, got {m1_new}")
        generator = torch.Generator().manual_seed(seed)

        def basis(rows: int) -> Float[Tensor, "row column"]:
            """Orthonormal columns, the first one with equal entries."""
            random = torch.randn(rows, m1_new - 1, generator=generator, dtype=torch.double)
            first = torch.ones(rows, 1, dtype=torch.double)
            found: Tensor = torch.linalg.qr(torch.cat([first, random], dim=1)).Q
            return found * found[0, 0].sign()

        mixing = basis(m1_new) @ basis(self.m1).T
        rows = tuple(tuple(row) for row in mixing.tolist())
        return replace(self, mixing=rows, shifts=(1,))

    @property
    def n_patterns(self) -> int:
        """The number of patterns that inputs carry besides the irrelevant ones."""
        return len(self.mixing) or self.m1

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The positive and the negative pattern of each task, counted from 0."""
        n = self.n_patterns
        return tuple((j, (j + step) % n) for step in self.shifts for j in range(n))

    @property
    def tasks(self) -> tuple[str, ...]:
        """``("1/2", ...)``: the positive pattern, and the negative one, counted from 1."""
        return tuple(f"{a + 1}/{b + 1}" for a, b in self.pairs)

    def patterns(self, device: torch.device | str = "cpu") -> Float[Tensor, "pattern dim"]:
        """The patterns that inputs carry, of norm ``beta``."""
        basis = self.beta * torch.eye(self.dim)[1 : self.m1 + 1]
        return (torch.tensor(self.mixing) @ basis if self.mixing else basis).to(device)

    def sample(
        self,
        batch_size: int,
        generator: torch.Generator,
        *,
        labels: Int[Tensor, " batch"] | None = None,
    ) -> Batch:
        """As for :meth:`Problem.sample`."""
        labels = draw_labels(batch_size, len(self.tasks), generator, labels)
        shape, device = (batch_size, self.n_points), generator.device

        def uniform() -> Float[Tensor, "batch point"]:
            return torch.rand(shape, generator=generator, device=device)

        def whole(below: int) -> Int[Tensor, "batch point"]:
            return torch.randint(below, shape, generator=generator, device=device)

        positive, negative = torch.tensor(self.pairs, device=device)[labels, :, None].unbind(1)
        own, coin, which = uniform() < self.alpha, 2 * whole(2) - 1, whole(self.n_patterns - 2)
        own[:, -1] = True
        # The others in order: skip the smaller of the task's two patterns, then the larger.
        which = which + (which >= torch.minimum(positive, negative))
        which = which + (which >= torch.maximum(positive, negative))
        carried = torch.where(own, torch.where(coin > 0, positive, negative), which)
        irrelevant = torch.eye(self.dim, device=device)[self.m1 + 1 :][whole(self.m2)]
        kappa = rearrange(uniform() - 0.5, "batch point -> batch point 1")
        xs = self.patterns(device)[carried] + self.beta * kappa * irrelevant
        counted = torch.arange(self.n_points, device=device) >= self.counted_from
        return Batch(xs, coin.float(), labels, (own & counted).float())

    def losses(
        self,
        predictions: Float[Tensor, "*rows"],
        targets: Float[Tensor, "*rows"],
        labels: Int[Tensor, "*#rows"],
    ) -> Float[Tensor, "*rows"]:
        """The hinge loss of each prediction, ``max(0, 1 - y f)``."""
        return (1 - targets * predictions).clamp(min=0)

    def right(
        self,
        predictions: Float[Tensor, "*rows"],
        targets: Float[Tensor, "*rows"],
        labels: Int[Tensor, "*#rows"],
    ) -> Bool[Tensor, "*rows"]:
        """Whether each prediction has the output's sign."""
        return targets * predictions > 0

    def carried(self, xs: Float[Tensor, "*rows dim"]) -> Int[Tensor, "*rows"]:
        """The relevant pattern that each input carries, which can be read off exactly."""
        products = einsum(xs, self.patterns(xs.device), "... dim, pattern dim -> ... pattern")
        return products.argmax(-1)

    def oracles(self, batch: Batch) -> dict[str, Float[Tensor, "batch point"]]:
        """The nearest demonstration, the Bayes-optimal signs for two priors, and the task itself.

        "nearest demonstration" gives the majority of the outputs of demonstrations with the same
        relevant pattern, 0 if there are none. "Bayes, these tasks" knows that the task is one of
        ``tasks``, "Bayes, all tasks" only that it is some pair of patterns; both know that the
        point counts, and give the likelier sign. "known task" is told the task.
        """
        carried, signs = self.carried(batch.xs), batch.ys.sign()
        same = rearrange(carried, "batch point -> batch point 1") == carried[:, None]
        votes = einsum(same.tril(-1).float(), signs, "batch point demo, batch demo -> batch point")
        everywhere = tuple((a, b) for a in range(self.n_patterns) for b in range(self.n_patterns))
        anything = tuple((a, b) for a, b in everywhere if a != b)
        known = self._signs(self.pairs, batch.xs.device)[batch.labels].gather(1, carried)
        return {
            "nearest demonstration": votes.sign(),
            "Bayes, these tasks": self._bayes(batch, self.pairs),
            "Bayes, all tasks": self._bayes(batch, anything),
            "known task": known,
        }

    def posterior(self, batch: Batch) -> Float[Tensor, "batch point task"]:
        """As for :meth:`Problem.posterior`."""
        return self._posterior(batch, self.pairs)

    def finding(self, run: Any) -> Finding:
        """Accuracy on the training tasks, on new tasks and on new patterns, and under pruning.

        See :func:`patterns_finding`.
        """
        return patterns_finding(run)

    def _bayes(
        self, batch: Batch, pairs: Sequence[tuple[int, int]]
    ) -> Float[Tensor, "batch point"]:
        """The sign of the expected output, given that the input carries one of the two patterns."""
        expected = einsum(
            self._posterior(batch, pairs),
            self._signs(pairs, batch.xs.device),
            "batch point task, task pattern -> batch point pattern",
        )
        own = rearrange(self.carried(batch.xs), "batch point -> batch point 1")
        means = expected.gather(2, own).squeeze(2)
        return torch.where(means.abs() > 1e-6, means.sign(), 0.0)

    def _posterior(
        self, batch: Batch, pairs: Sequence[tuple[int, int]]
    ) -> Float[Tensor, "batch point task"]:
        """``P(task | pairs before the point)`` over equally likely tasks."""
        signs = self._signs(pairs, batch.xs.device).double()
        others = (1 - self.alpha) / (2 * (self.n_patterns - 2))
        # P(pattern, output | task), for the outputs -1 and 1.
        by_output = [
            torch.where(signs == 0, others, self.alpha / 2 * (signs == output))
            for output in (-1, 1)
        ]
        table = torch.stack(by_output).log().clamp(min=_RULED_OUT)
        seen = table[(batch.ys > 0).long(), :, self.carried(batch.xs)]
        before = torch.cat([torch.zeros_like(seen[:, :1]), seen[:, :-1].cumsum(1)], dim=1)
        return before.softmax(-1).float()

    def _signs(
        self, pairs: Sequence[tuple[int, int]], device: torch.device
    ) -> Float[Tensor, "task pattern"]:
        """1 for the positive pattern of each task, -1 for the negative, 0 for the others."""
        ones = torch.eye(self.n_patterns, device=device)
        positive, negative = torch.tensor(pairs, device=device).unbind(-1)
        return ones[positive] - ones[negative]
