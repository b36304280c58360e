"""Scores: how each episode was answered, and the means and intervals of that.

The unit of every average and interval is the distinct query, not the episode: five prompts that ask
for the same answer to the same query are one observation of the task. Where episodes share their
demonstrations, intervals are over queries and sets of demonstrations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from transformer_lens_taskvec._utils.errors import Errors, Reply, sort_errors
from transformer_lens_taskvec._utils.metrics import ALWAYS
from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec._utils.statistics import (
    change_interval,
    means_by_query,
    share_interval,
)
from transformer_lens_taskvec._utils.text import spelled_size

LOSS_LABELS: Mapping[str, str] = {
    "nll": "NLL (nats)",
    "squared_error": "squared error",
    "cross_entropy": "cross-entropy (nats)",
    "logistic": "logistic loss (nats)",
    "hinge": "hinge loss",
    "loss": "loss",
}
"""The kinds of loss, and their names in figures."""


@dataclass(frozen=True, repr=False)
class Scores(Shown):
    """How each episode was answered.

    Attributes:
        metrics: By name, one number per episode, ``[example]``; always with ``correct`` (whether
            greedy decoding gives exactly the answer) and ``loss``.
        labels: ``[example]`` indices into ``tasks``.
        tasks: The tasks' names, in order of first appearance.
        queries: ``[example]``, a hash of each episode's task, query and answer. Averages are means
            over distinct queries of the mean over each query's episodes.
        loss_kind: ``"nll"``, the negative log-likelihood of the whole answer in nats, or
            of a model of the lab its problem's, such as ``"squared_error"``.
        stop: None, or ``"separator"`` if the separator had to follow the answer.
        bos: Whether a beginning-of-sequence token preceded the prompts.
        demo_sets: ``[example]``, equal where episodes share their demonstrations; None where all
            demonstrations are fresh, or there are none.
        replies: ``[example]``, what was asked and what the model answered; None unless
            ``keep_text`` was given.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> scores = tv.evaluate(tv.load_model("toy"), episodes, metrics=["rank"])
        >>> round(scores.accuracy, 1), round(scores.by_task()["XOR"], 1), list(scores.metrics)
        (1.0, 1.0, ['correct', 'loss', 'rank'])
    """

    metrics: Mapping[str, Shaped[Tensor, " example"]]
    labels: Int[Tensor, " example"]
    tasks: tuple[str, ...]
    queries: Int[Tensor, " example"]
    loss_kind: str = "nll"
    stop: str | None = None
    bos: bool = False
    demo_sets: Int[Tensor, " example"] | None = None
    replies: tuple[Reply, ...] | None = None

    @property
    def texts(self) -> tuple[str, ...] | None:
        """``[example]``, what the model answered; None unless ``keep_text`` was given."""
        return None if self.replies is None else tuple(reply.text for reply in self.replies)

    @property
    def correct(self) -> Bool[Tensor, " example"]:
        """Whether each episode's answer was right."""
        return self.metrics["correct"]

    @property
    def loss(self) -> Float[Tensor, " example"]:
        """Each episode's loss, of the kind ``loss_kind``."""
        return self.metrics["loss"]

    @property
    def accuracy(self) -> float:
        """The share answered right, over distinct queries."""
        return self.mean("correct")

    @property
    def mean_loss(self) -> float:
        """The mean loss, of the kind ``loss_kind``."""
        return self.mean("loss")

    @property
    def n_distinct(self) -> int:
        """The number of distinct queries."""
        return len(self.queries.unique())

    @property
    def size(self) -> str:
        """The numbers of queries and episodes as text: ``n = 8 queries (40 episodes)``.

        With several tasks they are those of each task, from the smallest to the largest. Shared
        sets of demonstrations are counted over all tasks.
        """
        by_task = [self.of(task) for task in self.tasks]
        size = spelled_size([own.n_distinct for own in by_task], [len(own) for own in by_task])
        shared = self.demo_sets
        return size if shared is None else f"{size}, {len(shared.unique())} demonstration sets"

    @property
    def extra(self) -> tuple[str, ...]:
        """The metrics other than ``correct`` and ``loss``."""
        return tuple(name for name in self.metrics if name not in ALWAYS)

    def mean(self, metric: str) -> float:
        """Return the mean of a metric over distinct queries.

        Raises:
            KeyError: If it was not measured.
        """
        if metric not in self.metrics:
            raise KeyError(f"no metric {metric!r}; there are: {', '.join(self.metrics)}")
        return float(means_by_query(self.metrics[metric], self.queries).mean())

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return the lower and upper end of Wilson's interval of the accuracy over queries.

        Where demonstrations are shared it is over queries and sets, and wider: their number is
        divided by the design effect, and the quantile is Student's.

        Args:
            confidence: Its coverage, between 0 and 1.
        """
        low, high = share_interval(self.correct, self.queries, self.demo_sets, confidence)
        return float(low), float(high)

    def select(self, rows: Shaped[Tensor, " row"]) -> Scores:
        """Return the scores of some episodes.

        Args:
            rows: Their indices, or a mask over all episodes.
        """
        metrics = {name: values[rows] for name, values in self.metrics.items()}
        sets = None if self.demo_sets is None else self.demo_sets[rows]
        replies = self.replies
        if replies is not None:
            replies = tuple(replies[at] for at in torch.arange(len(self))[rows].tolist())
        return replace(
            self,
            metrics=metrics,
            labels=self.labels[rows],
            queries=self.queries[rows],
            demo_sets=sets,
            replies=replies,
        )

    def of(self, task: str) -> Scores:
        """Return the scores of one task's episodes.

        Raises:
            KeyError: If there is no such task.
        """
        if task not in self.tasks:
            raise KeyError(f"no scores for task {task!r}; there are: {', '.join(self.tasks)}")
        own = self.select(self.labels == self.tasks.index(task))
        return replace(own, labels=torch.zeros_like(own.labels), tasks=(task,))

    def by_task(self, metric: str = "correct") -> dict[str, float]:
        """Return the mean of a metric per task, the accuracy by default."""
        return {task: self.of(task).mean(metric) for task in self.tasks}

    def errors(self, *, tasks: Iterable[Any] | Mapping[str, Any] = ()) -> Errors:
        """Return the kind of each wrong answer: the query's input, another task's answer, ...

        The other tasks are those of these scores and the given ones; of each, the outputs are
        known for the inputs that occur in these episodes, and of a given task for all of its
        inputs, or 16,384 of them.

        Args:
            tasks: Tasks to compare the answers with, such as those of the experiment.

        Raises:
            ValueError: If the answers were not kept.

        Example:
            >>> import transformer_lens_taskvec as tv
            >>> capitals = tv.find_tasks(["country_capital"])
            >>> episodes = tv.zero_shot(tv.sample_episodes(capitals, n=4, n_shots=1, seed=0))
            >>> scores = tv.evaluate(tv.load_model("toy"), episodes, keep_text=True)
            >>> scores.errors(tasks=capitals).to_frame()[["task", "kind", "n"]].values.tolist()
            [['country_capital', 'none of these', 4]]
        """
        if self.replies is None:
            raise ValueError(
                "these scores have no answers to sort; evaluate with keep_text=True to keep them"
            )
        names = [self.tasks[label] for label in self.labels.tolist()]
        kinds, others = sort_errors(self.replies, names, self.correct.tolist(), tasks=tasks)
        given = self.labels, self.tasks, self.queries, self.demo_sets
        return Errors(kinds, others, self.replies, *given)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per episode: ``task, query`` and the metrics.

        There is ``demo_set`` if demonstrations are shared, and ``input, answer, text`` if answers
        were kept.
        """
        columns = {name: values.tolist() for name, values in self.metrics.items()}
        if self.demo_sets is not None:
            columns["demo_set"] = self.demo_sets.tolist()
        if self.replies is not None:
            columns["input"] = [reply.query for reply in self.replies]
            columns["answer"] = [reply.answer for reply in self.replies]
            columns["text"] = [reply.text for reply in self.replies]
        tasks = [self.tasks[i] for i in self.labels.tolist()]
        return pd.DataFrame({"task": tasks, "query": self.queries.tolist(), **columns})

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        per_task = ", ".join(f"{task} {share:.2f}" for task, share in self.by_task().items())
        extra = "".join(f", {name} {self.mean(name):.3f}" for name in self.extra)
        return (
            f"Scores(accuracy {self.accuracy:.3f}, {LOSS_LABELS[self.loss_kind]} "
            f"{self.mean_loss:.3f}{extra}, {self.size}; {per_task})"
        )


def stack(scores: Sequence[Scores]) -> dict[str, Shaped[Tensor, "variant example"]]:
    """Return the metrics of several scores of the same episodes, one tensor per metric."""
    return {name: torch.stack([one.metrics[name] for one in scores]) for name in scores[0].metrics}


def mean_by_task(
    values: Shaped[Tensor, "*many example"], scores: Scores
) -> Float[Tensor, "*many task"]:
    """Return the mean over each task's distinct queries, in float64.

    Args:
        values: One value per episode.
        scores: Scores of the same episodes, which name their tasks and queries.
    """
    own = [scores.labels == index for index in range(len(scores.tasks))]
    means = [means_by_query(values[..., rows], scores.queries[rows]) for rows in own]
    return torch.stack([one.mean(dim=-1) for one in means], dim=-1)


def intervals_by_task(
    values: Shaped[Tensor, "*many example"], scores: Scores, *, shares: bool = False
) -> Float[Tensor, "*many task 2"]:
    """Return the 95 % interval of the mean over each task's distinct queries.

    Args:
        values: One value per episode.
        scores: Scores of the same episodes, which name their tasks, queries and shared sets of
            demonstrations.
        shares: Whether the values are shares, so that the interval is Wilson's; otherwise it is
            Student's with a correction for skewness.
    """
    found = []
    for index in range(len(scores.tasks)):
        rows = scores.labels == index
        own = scores.select(rows)
        given = values[..., rows], own.queries, own.demo_sets
        ends = torch.stack(share_interval(*given), dim=-1) if shares else change_interval(*given)
        found.append(ends)
    return torch.stack(found, dim=-2)
