"""Sequences of a regression problem as episodes, so that the library's functions take them.

A regression episode has a prompt of real vectors, and its answer is a number. The query is the
last token of the prompt, and the loss is the squared error instead of the answer's NLL.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_taskvec._utils.text import stable_hash
from transformer_lens_taskvec.lab.model import interleave
from transformer_lens_taskvec.lab.problems.base import Problem, balanced_labels
from transformer_lens_taskvec.prompts import PromptTemplate

_INTERLEAVED = PromptTemplate("{x} {y}", separator=" ")


@dataclass(frozen=True, eq=False)
class LabEpisode:
    """One sequence of a problem: demonstrations, and a query with its answer.

    Attributes:
        task: The latent task.
        xs: Inputs, ``[point, dim]``; the last is the query's.
        ys: The demonstrations' outputs, ``[demo]``, one fewer than inputs.
        answer: The query's noisy output.
        rule: Whether a prediction counts as right, given it and the answer; the problem's.
        template: How the sequence is written, for the record that results keep.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> episode, *_ = lab.problem_episodes(lab.SparseLinearMixture.small(), n=1, n_shots=3)
        >>> episode.task, episode.n_shots, episode.prompt.shape  # x1 y1 x2 y2 x3 y3 x4
        ('B1', 3, torch.Size([7, 8]))
    """

    task: str
    xs: Float[Tensor, "point dim"]
    ys: Float[Tensor, " demo"]
    answer: float
    rule: Callable[[float, float], bool]
    template: PromptTemplate = _INTERLEAVED

    @property
    def prompt(self) -> Float[Tensor, "token dim"]:
        """The tokens ``x_1, y_1, ..., x_n``."""
        return interleave(self.xs[None], self.ys[None])[0]

    @property
    def n_shots(self) -> int:
        """The number of demonstrations."""
        return len(self.ys)

    @property
    def outputs_begin(self) -> tuple[int, ...]:
        """The tokens at which the outputs stand, the last one after the prompt's end."""
        return tuple(range(1, 2 * len(self.xs), 2))

    @property
    def examples_begin(self) -> tuple[int, ...]:
        """The tokens at which the demonstrations begin, and at last the query."""
        return tuple(range(0, 2 * len(self.xs), 2))

    @property
    def query_id(self) -> int:
        """A hash of the task, the query's input and the answer."""
        return stable_hash(self.task, self.xs[-1].cpu().numpy().tobytes(), repr(self.answer))

    @property
    def input_id(self) -> int:
        """A hash of the query's input alone."""
        return stable_hash(self.xs[-1].cpu().numpy().tobytes())

    def is_right(self, prediction: float) -> bool:
        """Whether a prediction counts as right, by the problem's rule."""
        return self.rule(prediction, self.answer)

    def with_answers(self, order: Sequence[int]) -> LabEpisode:
        """The same episode with its demonstrations' outputs in another order."""
        return replace(self, ys=self.ys[list(order)])


def problem_episodes(
    problem: Problem, n: int, n_shots: int | None = None, seed: int = 0
) -> list[LabEpisode]:
    """Sample ``n`` episodes of each latent task, task by task.

    Args:
        problem: What the sequences are drawn from.
        n: Episodes per task.
        n_shots: Demonstrations per episode; by default as many as a sequence of the problem has
            before its last point.
        seed: Seed of the sampling.

    Raises:
        ValueError: If ``n`` is below 1, or a sequence is too short for ``n_shots``.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> len(lab.problem_episodes(lab.SparseLinearMixture.small(), n=2))  # of 4 tasks
        8
    """
    n_shots = problem.n_points - 1 if n_shots is None else n_shots
    if not 0 <= n_shots < problem.n_points:
        raise ValueError(
            f"n_shots is {n_shots}; a sequence of {problem.n_points} points has 0 to "
            f"{problem.n_points - 1} demonstrations"
        )
    if n < 1:
        raise ValueError(f"n is {n}; ask for 1 episode or more")
    labels = balanced_labels(len(problem.tasks), n)
    batch = problem.sample(len(labels), torch.Generator().manual_seed(seed), labels=labels)
    return [
        LabEpisode(
            problem.tasks[int(label)],
            xs[: n_shots + 1],
            ys[:n_shots],
            float(ys[n_shots]),
            problem.is_right,
        )
        for xs, ys, label in zip(batch.xs, batch.ys, batch.labels, strict=True)
    ]
