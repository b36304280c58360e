"""What a model answered where it was wrong, and what kind of wrong answer that is.

An accuracy of 0.00 may mean that the model repeats the query, or that it does another task, or that
it has the task and not the item. The kinds are tried in the order of :data:`KINDS`, and the first
that fits counts: an answer may agree by chance with each of them. It fits if what the model says
begins with it; more may follow, but not within a word or a number.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec._utils.statistics import means_by_query, share_interval

KINDS = (
    "right text",
    "the query",
    "another task's answer",
    "a demonstration's answer",
    "wrong item",
    "none of these",
)
"""The kinds of wrong answers.

- ``right text``: the right text, but in other tokens, or not followed by the separator;
- ``the query``: the query's input;
- ``another task's answer``: what another task gives for the same input;
- ``a demonstration's answer``: the output of one of the prompt's demonstrations;
- ``wrong item``: what the task gives for another input;
- ``none of these``: everything else, no answer included.
"""

_MOST_PAIRS = 1 << 14
"""The most examples that are drawn from a task."""

_EXAMPLES = 3
"""The most examples of a kind that a table shows."""


@dataclass(frozen=True)
class Reply:
    """What one episode asked, and what the model answered.

    Attributes:
        query: The query's input.
        answer: The right output.
        text: The model's greedy answer up to the separator, as an output: without the spaces around
            it, or what the template puts there. Where the model is right it is ``answer``.
        demos: Inputs and outputs of the demonstrations.
    """

    query: str
    answer: str
    text: str
    demos: tuple[tuple[str, str], ...] = ()

    def __repr__(self) -> str:
        return f"{self.query!r} -> {self.text!r}"


def reply_to(episode: Any, text: str) -> Reply:
    """Return what an episode asked and the model answered.

    Args:
        episode: An episode of text.
        text: What the model continued the prompt with.
    """
    query, demos = episode.query, tuple((demo.x, demo.y) for demo in episode.demos)
    # What the template puts around an output is not part of it.
    before, _, after = episode.template.answer(query.x, "\0").partition("\0")
    output = text.strip().removeprefix(before.strip()).removesuffix(after.strip()).strip()
    return Reply(query.x, query.y, output, demos)


@dataclass(frozen=True, repr=False)
class Errors(Shown):
    """The kind of each wrong answer; made by :meth:`Scores.errors`.

    Attributes:
        kinds: ``[example]``, one of :data:`KINDS`, or the empty string if the answer is right.
        others: ``[example]``, the other tasks that give the answer for the same input.
        replies: ``[example]``, what was asked and answered.
        labels: ``[example]`` indices into ``tasks``.
        tasks: The tasks' names.
        queries: ``[example]``, equal where episodes ask the same query.
        demo_sets: ``[example]``, equal where episodes share their demonstrations, or None.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model, tasks = tv.load_model("toy"), tv.bitwise_tasks(null=False)
        >>> sets = tv.sample_splits(tasks, {"train": 10, "test": 10}, n_shots=4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, sets["train"]))
        >>> xor = [e for e in tv.zero_shot(sets["test"]) if e.task == "XOR"]
        >>> scores = tv.evaluate(model, xor, vectors.inject("OR", layer=1), keep_text=True)
        >>> found = scores.errors(tasks=tasks)
        >>> found.shares.idxmax(axis=1).to_dict()
        {'XOR': "another task's answer"}
    """

    kinds: tuple[str, ...]
    others: tuple[tuple[str, ...], ...]
    replies: tuple[Reply, ...]
    labels: Int[Tensor, " example"]
    tasks: tuple[str, ...]
    queries: Int[Tensor, " example"]
    demo_sets: Int[Tensor, " example"] | None = None

    @property
    def shares(self) -> pd.DataFrame:
        """The share of each kind among all answers, by task and kind.

        It is a mean over distinct queries; with the accuracy, a task's shares sum to 1.
        """
        rows = [
            [float(means_by_query(of, self.queries[own]).mean()) for of in self._by_kind(own)]
            for own in self._of_tasks()
        ]
        return pd.DataFrame(rows, index=pd.Index(self.tasks, name="task"), columns=[*KINDS])

    def to_frame(self) -> pd.DataFrame:
        """Return one row per task and kind that occurs.

        Columns: ``task, kind, n`` (episodes), ``share`` among all answers, over distinct queries,
        ``low, high`` (Wilson's 95 % interval of it), ``mostly`` (the other task whose answers these
        are most often), ``examples`` (the query, and what the model answered).
        """
        rows = []
        for task, own in zip(self.tasks, self._of_tasks(), strict=True):
            sets = None if self.demo_sets is None else self.demo_sets[own]
            for kind, of in zip(KINDS, self._by_kind(own), strict=True):
                if not bool(of.any()):
                    continue
                low, high = share_interval(of, self.queries[own], sets)
                at = torch.where(own)[0][of].tolist()
                mostly = Counter(other for place in at for other in self.others[place])
                examples = dict.fromkeys(repr(self.replies[place]) for place in at)
                row = {
                    "task": task,
                    "kind": kind,
                    "n": len(at),
                    "share": float(means_by_query(of, self.queries[own]).mean()),
                    "low": float(low),
                    "high": float(high),
                    "mostly": mostly.most_common(1)[0][0] if mostly else "",
                    "examples": "; ".join([*examples][:_EXAMPLES]),
                }
                rows.append(row)
        columns = ["task", "kind", "n", "share", "low", "high", "mostly", "examples"]
        return pd.DataFrame(rows, columns=columns)

    def to_json(self) -> list[dict[str, Any]]:
        """Return the rows of the table as plain values."""
        rows: list[dict[str, Any]] = json.loads(self.to_frame().to_json(orient="records"))
        return rows

    def _of_tasks(self) -> list[Bool[Tensor, " example"]]:
        return [self.labels == index for index in range(len(self.tasks))]

    def _by_kind(self, own: Bool[Tensor, " example"]) -> list[Bool[Tensor, " row"]]:
        kinds = [self.kinds[place] for place in torch.where(own)[0].tolist()]
        return [torch.tensor([one == kind for one in kinds]) for kind in KINDS]

    def __repr__(self) -> str:
        shares = self.shares
        most = ", ".join(
            f"{task} {shares.loc[task].max():.2f} {shares.loc[task].idxmax()}"
            if shares.loc[task].max()
            else f"{task} none"
            for task in self.tasks
        )
        wrong = sum(map(bool, self.kinds))
        return f"Errors({wrong} of {len(self.kinds)} answers are wrong; most often: {most})"


def sort_errors(
    replies: Sequence[Reply],
    names: Sequence[str],
    correct: Sequence[bool],
    *,
    tasks: Iterable[Any] | Mapping[str, Any] = (),
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Return the kind of each reply, and the other tasks that give it for the same input.

    Args:
        replies: The replies.
        names: The task of each.
        correct: Whether each is right.
        tasks: Tasks of which more answers are known than from the replies.
    """
    known = _known(replies, names, tasks)
    outputs = {task: {y for ys in pairs.values() for y in ys} for task, pairs in known.items()}
    kinds, others = [], []
    for reply, task, right in zip(replies, names, correct, strict=True):
        said = _beginnings(reply.text)
        same = {
            other: pairs.get(reply.query.strip(), set())
            for other, pairs in known.items()
            if other != task
        }
        fits = (
            {reply.answer.strip()} & said,
            {reply.query.strip()} & said,
            set().union(*same.values()) & said,
            {y.strip() for _, y in reply.demos} & said,
            outputs[task] & said,
            {""},
        )
        kind = "" if right else next(name for name, fit in zip(KINDS, fits, strict=True) if fit)
        kinds.append(kind)
        of_others = kind == "another task's answer"
        others.append(tuple(other for other, ys in same.items() if of_others and ys & said))
    return tuple(kinds), tuple(others)


def _known(
    replies: Sequence[Reply], names: Sequence[str], tasks: Iterable[Any] | Mapping[str, Any]
) -> dict[str, dict[str, set[str]]]:
    """Return the outputs that are known of each task, by input."""
    known: dict[str, dict[str, set[str]]] = {name: {} for name in names}
    given: Iterable[Any] = tasks.values() if isinstance(tasks, Mapping) else tasks
    pairs = [
        (name, *pair)
        for reply, name in zip(replies, names, strict=True)
        for pair in ((reply.query, reply.answer), *reply.demos)
    ]
    for task in given:
        n = min(len(task), _MOST_PAIRS) if isinstance(task, Sized) else _MOST_PAIRS
        pairs += [(task.name, one.x, one.y) for one in task.sample(n, random.Random(0))]
    for name, x, y in pairs:
        known.setdefault(name, {}).setdefault(x.strip(), set()).add(y.strip())
    return known


def _beginnings(text: str) -> set[str]:
    """Return what the text begins with, up to each place that is not within a word or a number."""
    within = (text[end - 1 : end + 1].isalnum() for end in range(1, len(text)))
    ends = [end for end, inside in enumerate(within, start=1) if not inside]
    return {text, *(text[:end] for end in ends)} - {""}
