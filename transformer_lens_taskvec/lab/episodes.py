"""Sequences of a problem as episodes, so that the library's functions take them.

A lab episode has a prompt of real vectors or token ids, and its answer is one number or several, or
a token. The query is the last token of the prompt, and the loss is the problem's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from transformer_lens_taskvec._utils.text import stable_hash
from transformer_lens_taskvec.lab.problems.base import Batch, Problem, balanced_labels
from transformer_lens_taskvec.prompts import PromptTemplate

_INTERLEAVED = PromptTemplate("{x} {y}", separator=" ")


@dataclass(frozen=True, eq=False)
class LabEpisode:
    """One sequence of a problem: demonstrations, and a query with its answer.

    Attributes:
        task: The latent task.
        xs: Inputs, ``[point, dim]``, the last one the query's; or token ids, ``[token]``.
        ys: The outputs before the query's, ``[demo]``, or ``[demo, output]``.
        target: The query's output, which the model is to predict: a number, or ``[output]``.
        problem: What the sequence is drawn from; it says what the model reads and how a prediction
            counts.
        template: How the sequence is written, for the record that results keep.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> episode, *_ = lab.problem_episodes(lab.SparseLinearMixture.small(), n=1, n_shots=3)
        >>> episode.task, episode.n_shots, episode.prompt.shape  # x1 y1 x2 y2 x3 y3 x4
        ('B1', 3, torch.Size([7, 8]))
    """

    task: str
    xs: Shaped[Tensor, "point_or_token ..."]
    ys: Shaped[Tensor, "demo ..."]
    target: Tensor
    problem: Problem
    template: PromptTemplate = _INTERLEAVED

    @property
    def prompt(self) -> Shaped[Tensor, "token ..."]:
        """What the model reads, to the query."""
        return self.problem.tokens(Batch(self.xs[None], self.ys[None], self._label))[0]

    @property
    def answer(self) -> float | list[float]:
        """The query's output: a number, or several."""
        answer: float | list[float] = self.target.tolist()
        return answer

    @property
    def loss_kind(self) -> str:
        """What :meth:`losses` gives."""
        return self.problem.loss_kind

    @property
    def n_shots(self) -> int:
        """The number of demonstrations."""
        return len(self.ys)

    @property
    def outputs_begin(self) -> tuple[int, ...]:
        """The tokens at which the outputs stand, the last one after the prompt's end."""
        return tuple(self.problem.query_at(point) + 1 for point in range(self.n_shots + 1))

    @property
    def examples_begin(self) -> tuple[int, ...]:
        """The tokens at which the demonstrations begin, and at last the query."""
        return tuple(self.problem.query_at(point) for point in range(self.n_shots + 1))

    @property
    def query_id(self) -> int:
        """A hash of the task, the query's input and the answer."""
        return stable_hash(self.task, self._query.cpu().numpy().tobytes(), repr(self.answer))

    @property
    def input_id(self) -> int:
        """A hash of the query's input alone."""
        return stable_hash(self._query.cpu().numpy().tobytes())

    def losses(self, predictions: Float[Tensor, "variant ..."]) -> Float[Tensor, " variant"]:
        """The loss of some predictions of the answer."""
        return self.problem.losses(predictions, *self._expected(predictions))

    def right(self, predictions: Float[Tensor, "variant ..."]) -> Bool[Tensor, " variant"]:
        """Whether some predictions of the answer count as right."""
        return self.problem.right(predictions, *self._expected(predictions))

    def with_answers(self, order: Sequence[int]) -> LabEpisode:
        """The same episode with its demonstrations' outputs in another order.

        Raises:
            ValueError: If the sequence is of tokens, among which the outputs are.
        """
        if not self.xs.is_floating_point():
            raise ValueError(
                f"a sequence of {type(self.problem).__name__} is a row of tokens, whose outputs "
                "cannot be put in another order; compare with sequences of your own"
            )
        return replace(self, ys=self.ys[list(order)])

    @property
    def _query(self) -> Tensor:
        """The query's input; of a row of tokens, all of it."""
        return self.xs[-1] if self.xs.is_floating_point() else self.xs

    @property
    def _label(self) -> Int[Tensor, " one"]:
        return torch.tensor([self.problem.tasks.index(self.task)])

    def _expected(self, predictions: Tensor) -> tuple[Tensor, Tensor]:
        """The target and the label of each prediction."""
        target = self.target.to(predictions.device).expand(len(predictions), *self.target.shape)
        return target, self._label.to(predictions.device).expand(len(predictions))


def problem_episodes(
    problem: Problem, n: int, n_shots: int | None = None, seed: int = 0
) -> list[LabEpisode]:
    """Sample ``n`` episodes of each latent task, task by task.

    Args:
        problem: What the sequences are drawn from.
        n: Episodes per task.
        n_shots: Demonstrations per episode, or points before the query; by default as many as a
            sequence has before the problem's ``query_point``, its last.
        seed: Seed of the sampling.

    Raises:
        ValueError: If ``n`` is below 1, or a sequence is too short for ``n_shots``.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> len(lab.problem_episodes(lab.SparseLinearMixture.small(), n=2))  # of 4 tasks
        8
    """
    n_shots = problem.query_point if n_shots is None else n_shots
    if not 0 <= n_shots < problem.n_points:
        raise ValueError(
            f"n_shots is {n_shots}; a sequence of {problem.n_points} points has 0 to "
            f"{problem.n_points - 1} demonstrations"
        )
    if n < 1:
        raise ValueError(f"n is {n}; ask for 1 episode or more")
    labels = balanced_labels(len(problem.tasks), n)
    batch = problem.sample(len(labels), torch.Generator().manual_seed(seed), labels=labels)
    length = problem.inputs_until(n_shots)
    return [
        LabEpisode(problem.tasks[int(label)], xs[:length], ys[:n_shots], ys[n_shots], problem)
        for xs, ys, label in zip(batch.xs, batch.ys, batch.labels, strict=True)
    ]
