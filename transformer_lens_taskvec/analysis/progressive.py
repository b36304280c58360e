"""Progressive in-context learning: the first tokens few-shot, the rest zero-shot with a vector.

Demonstrations matter most for the first tokens of an answer. So the first ``k`` are generated after
demonstrations, and the model goes on from the query and these tokens alone, with a task vector at
the query's separator (Liu et al. 2024, PICA). With ``k = 0`` the vector is alone; without a vector
only the first tokens tell the task.

Greedy decoding gives exactly the right answer if and only if, with the answer fed in, each of its
tokens is the argmax where it is predicted: the first ``k`` after the few-shot prompt, the others
after the zero-shot one. So one teacher-forced pass of each gives the accuracy at every ``k``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from transformer_lens_taskvec._utils.metrics import Answered
from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec._utils.statistics import means_by_query
from transformer_lens_taskvec.activations import label
from transformer_lens_taskvec.analysis.comparison import compare
from transformer_lens_taskvec.analysis.named import NamedVariants, check_few_shot, named_variants
from transformer_lens_taskvec.generation import continue_ids
from transformer_lens_taskvec.interventions.checks import check_variants
from transformer_lens_taskvec.interventions.intervention import Intervention, altered
from transformer_lens_taskvec.interventions.variants import Hook, Variants, at_separators, grouped
from transformer_lens_taskvec.models.carried import taking_along
from transformer_lens_taskvec.models.decoding import decoding_of
from transformer_lens_taskvec.models.tokens import (
    Each,
    Position,
    decode,
    encode_answers,
    encode_prompts,
    row_indices,
)
from transformer_lens_taskvec.prompts import Episode, zero_shot
from transformer_lens_taskvec.scoring import Scores, evaluate, evaluate_many
from transformer_lens_taskvec.vectors.base import Injectable

ALL = "all tasks"
"""The rows of all tasks' queries together."""

COSTS = ("tokens", "tokens_uncached", "attended")
"""What an answer costs: tokens that the model runs, with and without a KV cache, and the pairs of
a token and one that it attends to."""

KEPT = -0.1
"""Accuracy counts as kept if the interval of its difference from few-shot lies above this."""


@dataclass(frozen=True, repr=False)
class ProgressiveIcl(Shown):
    """How answers do whose first tokens are few-shot, by the number of these tokens.

    Attributes:
        scores: By variant, the scores with each of the first tokens' numbers ``ks``.
        few_shot: The scores with the whole answer few-shot.
        ks: The numbers of few-shot tokens.
        costs: ``[k, example]`` by name in :data:`COSTS`, of an answer of the right length: both
            prompts and each new token but the last.
        few_shot_costs: ``[example]`` of the same, few-shot.
        lengths: ``[example]``, the number of tokens of the right answers.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> sizes = {"train": 10, "test": 20}
        >>> sets = tv.sample_splits(tv.find_tasks(["XOR", "OR"]), sizes, n_shots=4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, sets["train"]))
        >>> found = progressive_icl(model, sets["test"], vectors=vectors, layer=1, ks=[0, 2, 5])
        >>> xor = found.table().round(2).loc["XOR"]
        >>> xor.loc["task vector"].tolist(), xor.loc["zero-shot"].tolist()
        ([1.0, 1.0, 1.0, 1.0], [0.55, 0.8, 1.0, 1.0])
    """

    scores: Mapping[str, tuple[Scores, ...]]
    few_shot: Scores
    ks: tuple[int, ...]
    costs: Mapping[str, Int[Tensor, "k example"]]
    few_shot_costs: Mapping[str, Int[Tensor, " example"]]
    lengths: Int[Tensor, " example"]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names."""
        return self.few_shot.tasks

    def to_frame(self) -> pd.DataFrame:
        """Return one row per task, variant and number of few-shot tokens.

        Columns: ``task, variant, k``; ``accuracy`` with Wilson's 95 % interval ``low`` and
        ``high``; ``few_shot``, the accuracy with the whole answer few-shot; ``difference``, what is
        gained on it, with Tango's 95 % interval for paired shares ``difference_low`` and
        ``difference_high``; ``kept``, whether that interval lies above -0.1; each of
        :data:`COSTS`, the mean per query, and ``..._ratio``, divided by that of few-shot answers;
        ``length``, the mean number of tokens of the right answers, and ``whole``, the share of
        answers that have no more than ``k``; ``n_distinct``. Of several tasks, rows of all their
        queries together follow, as the task ``all tasks``.
        """
        tasks = [*self.tasks, *([ALL] if len(self.tasks) > 1 else [])]
        of_all = self._together(self.few_shot)
        rows = []
        for name, by_k in self.scores.items():
            for place, (k, scores) in enumerate(zip(self.ks, by_k, strict=True)):
                tables = [compare(scores, self.few_shot).to_frame()]
                if len(self.tasks) > 1:
                    tables.append(compare(self._together(scores), of_all).to_frame())
                for task, found in zip(tasks, pd.concat(tables).to_dict("records"), strict=True):
                    row = {"task": task, "variant": name, "k": k, "accuracy": found["accuracy"]}
                    row |= {"low": found["accuracy_low"], "high": found["accuracy_high"]}
                    row |= {"few_shot": found["other"], "difference": found["difference"]}
                    row |= {"difference_low": found["low"], "difference_high": found["high"]}
                    row["kept"] = found["low"] > KEPT
                    for cost in COSTS:
                        own = self._mean(self.costs[cost][place], task)
                        row[cost] = own
                        row[f"{cost}_ratio"] = own / self._mean(self.few_shot_costs[cost], task)
                    row["length"] = self._mean(self.lengths, task)
                    row["whole"] = self._mean(self.lengths <= k, task)
                    rows.append({**row, "n_distinct": found["n_distinct"]})
        frame = pd.DataFrame(rows)
        order = {task: place for place, task in enumerate(tasks)}
        return frame.sort_values(
            "task", key=lambda of: of.map(order), kind="stable", ignore_index=True
        )

    def table(self) -> pd.DataFrame:
        """Return accuracies: a row per task and variant, a column per ``k``, and few-shot."""
        frame = self.to_frame()
        table = frame.pivot(index=["task", "variant"], columns="k", values="accuracy")
        names = dict.fromkeys(zip(frame.task, frame.variant, strict=True))
        table = table.reindex(pd.MultiIndex.from_tuples([*names], names=["task", "variant"]))
        return table.assign(few_shot=frame.groupby(["task", "variant"]).few_shot.first())

    def first_kept(self) -> pd.DataFrame:
        """Return the smallest ``k`` from which on accuracy is kept, per task and variant.

        Columns: ``task, variant, k``, None where it is not kept at the largest ``k``, and the
        ``tokens_ratio`` and ``attended_ratio`` there.
        """
        rows = []
        for (task, variant), own in self.to_frame().groupby(["task", "variant"], sort=False):
            lost = own.k[~own.kept]
            after = own[own.k > (-1 if lost.empty else lost.max())]
            row: dict[str, Any] = {"task": task, "variant": variant, "k": None}
            row |= {"tokens_ratio": None, "attended_ratio": None}
            if len(after):
                best = after.sort_values("k").iloc[0]
                row |= {"k": int(best.k), **best[["tokens_ratio", "attended_ratio"]]}
            rows.append(row)
        return pd.DataFrame(rows)

    def _together(self, scores: Scores) -> Scores:
        return replace(scores, labels=torch.zeros_like(scores.labels), tasks=(ALL,))

    def _mean(self, values: Shaped[Tensor, " example"], task: str) -> float:
        rows = torch.ones(len(values), dtype=torch.bool)
        if task in self.tasks:
            rows = self.few_shot.labels == self.tasks.index(task)
        return float(means_by_query(values[rows], self.few_shot.queries[rows]).mean())

    def __repr__(self) -> str:
        means = self.to_frame()
        means = means[means.task == (ALL if len(self.tasks) > 1 else self.tasks[0])]
        lines = [
            f"{name}: " + ", ".join(f"{row.k} {row.accuracy:.2f}" for row in own.itertuples())
            for name, own in means.groupby("variant", sort=False)
        ]
        return (
            f"ProgressiveIcl(accuracy by few-shot tokens: {'; '.join(lines)}; all of them "
            f"{self._together(self.few_shot).accuracy:.2f}; {self.few_shot.size})"
        )


def progressive_icl(
    model: Any,
    few_shot: Sequence[Episode],
    variants: NamedVariants | None = None,
    *,
    vectors: Injectable | None = None,
    layer: int | None = None,
    controls: bool | Mapping[str, Injectable] = True,
    ks: Iterable[int] = range(9),
    seed: int = 0,
    stop: str | None = None,
    max_tokens: int | None = None,
) -> ProgressiveIcl:
    """Return the accuracy of progressive in-context learning by the number of few-shot tokens.

    Args:
        model: Any model with TransformerLens' hook API and a tokenizer.
        few_shot: Few-shot episodes, with other queries than vectors were taken from; best of tasks
            whose answers have several tokens.
        variants: As for :func:`icl_fidelity`. Nothing injected, ``"zero-shot"``, is always there.
        vectors: Task vectors, or anything else that can be injected: the variant ``task vector``.
        layer: The layer of the vectors.
        controls: As for :func:`icl_fidelity`.
        ks: How many tokens are few-shot; an answer of no more tokens is wholly few-shot.
        seed: Seed of the controls.
        stop: As for :func:`evaluate`: whether the separator is the last token of right answers.
        max_tokens: As for :func:`evaluate`.

    Raises:
        ValueError: If there are no episodes, one has no demonstrations or an answer that is a
            number, ``ks`` is empty or has a number below 0, or as for :func:`evaluate_many`.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.find_tasks(["XOR"]), 10, 4, seed=0)
        >>> found = progressive_icl(model, episodes, ks=[0, 5])
        >>> found.to_frame()[["variant", "k", "accuracy", "few_shot", "kept"]].values.tolist()
        [['zero-shot', 0, 0.4, 1.0, False], ['zero-shot', 5, 1.0, 1.0, False]]
    """
    few_shot, ks = list(few_shot), tuple(dict.fromkeys(ks))
    check_few_shot(few_shot)
    if not ks or min(ks) < 0:
        raise ValueError(f"ks is {list(ks)}; give at least one number, none below 0")
    zero = zero_shot(few_shot)
    layers = None if vectors is None else [layer]
    named = named_variants(model, zero, variants or {}, vectors, layers, controls, seed)
    options: dict[str, Any] = {"stop": stop, "max_tokens": max_tokens}
    before = evaluate(model, few_shot, metrics=_parts(ks, "before"), **options)
    after = evaluate_many(
        model,
        zero,
        lambda task: [list(of(task)) for of in named.values()],
        metrics=_parts(ks, "after"),
        **options,
    )
    prompts, short = (encode_prompts(model, some)[0] for some in (few_shot, zero))
    lengths = torch.tensor([len(ids) for ids in encode_answers(model, few_shot, stop=stop)])
    costs = {k: _costs(k, prompts, short, lengths) for k in (*ks, int(lengths.max()))}
    plain = replace(before, metrics={name: before.metrics[name] for name in ("correct", "loss")})
    return ProgressiveIcl(
        {
            name: tuple(_joined(before, scores, k) for k in ks)
            for (name, _), scores in zip(named, after, strict=True)
        },
        plain,
        ks,
        {name: torch.stack([costs[k][name] for k in ks]) for name in COSTS},
        costs[int(lengths.max())],
        lengths,
    )


def progressive_generate(
    model: Any,
    few_shot: Sequence[Episode],
    variants: Variants = ((),),
    *,
    k: int,
    max_new_tokens: int,
    stop: str | None = None,
) -> list[list[str]]:
    r"""Return greedy continuations whose first ``k`` tokens are few-shot and the rest zero-shot.

    The tokens are generated after the few-shot prompt. Then each variant goes on from the query
    without demonstrations and these tokens, with its interventions where they act in the query's
    prompt.

    Args:
        model: Any model with TransformerLens' hook API and a tokenizer.
        few_shot: Few-shot episodes.
        variants: As for :func:`evaluate_many`; by default nothing is injected.
        k: How many tokens are few-shot.
        max_new_tokens: The most tokens per continuation, the first ``k`` included.
        stop: As for :func:`generate`.

    Returns:
        For each variant, the continuation of each episode's prompt.

    Raises:
        ValueError: If there are no episodes, one has no demonstrations, ``k`` is not between 0 and
            ``max_new_tokens``, or an intervention does not fit the model.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.find_tasks(["XOR", "OR"]), 10, 4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, episodes))
        >>> variants = lambda task: [[], vectors.inject(task, layer=1)]
        >>> options = {"k": 1, "max_new_tokens": 5}
        >>> alone, injected = progressive_generate(model, episodes[:1], variants, **options)
        >>> injected == [episodes[0].answer], alone == [episodes[0].answer]
        (True, False)
    """
    few_shot = list(few_shot)
    check_few_shot(few_shot)
    if not 0 <= k <= max_new_tokens or max_new_tokens < 1:
        raise ValueError(
            f"k is {k} and max_new_tokens {max_new_tokens}; k must be from 0 to max_new_tokens, "
            "which must be at least 1"
        )
    zero = zero_shot(few_shot)
    tasks, labels = label(few_shot)
    groups = grouped(variants, labels, tasks)
    for _, some in groups:
        check_variants(model, some)
    prompts, short = (encode_prompts(model, some)[0] for some in (few_shot, zero))
    decoding = decoding_of(model, max_new_tokens=max_new_tokens, stop=stop)
    found: list[list[list[int]]] = []
    with taking_along(model, Intervention) as carried:
        first: list[list[int]] = [[] for _ in few_shot]
        if k:
            [edits] = at_separators(model, [carried], few_shot)
            first = continue_ids(model, prompts, replace(decoding, max_new_tokens=k), edits)
        open_ = [
            len(ids) == k < max_new_tokens
            and (not ids or ids[-1] not in decoding.ends)
            and (stop is None or stop not in decode(model, ids))
            for ids in first
        ]
        found = [[list(ids) for ids in first] for _ in groups[0][1]]
        for rows, some in groups:
            own = [row for row in rows.tolist() if open_[row]]
            for place, variant in enumerate(some if own else ()):
                both = [*carried, *variant]
                [edits] = at_separators(model, [both], [zero[row] for row in own])
                _check_inside(edits, min(len(short[row]) for row in own))
                asked = [[*short[row], *first[row]] for row in own]
                left = replace(decoding, max_new_tokens=max_new_tokens - k)
                rest = continue_ids(model, asked, left, [_earlier(hook, k) for hook in edits])
                for row, ids in zip(own, rest, strict=True):
                    found[place][row] += ids
    return [[decoding.text(model, ids) for ids in of_variant] for of_variant in found]


@dataclass(frozen=True, eq=False)
class _Part:
    """A metric of an answer's tokens before or after the first ``k``.

    Attributes:
        name: ``"correct"``, whether they are all right, or ``"loss"``.
        side: ``"before"`` or ``"after"``.
        k: How many tokens come before.
    """

    name: str
    side: str
    k: int

    @property
    def __name__(self) -> str:
        return f"{self.name}_{self.side}_{self.k}"

    def of_answered(self, answered: Answered) -> Float[Tensor, "row variant"]:
        tokens = slice(self.k) if self.side == "before" else slice(self.k, None)
        if self.name == "correct":
            return answered.right_by_token[..., tokens].all(dim=-1).float()
        return answered.nll_by_token[..., tokens].sum(dim=-1)


def _parts(ks: Sequence[int], side: str) -> list[_Part]:
    return [_Part(name, side, k) for k in dict.fromkeys(ks) for name in ("correct", "loss")]


def _joined(before: Scores, after: Scores, k: int) -> Scores:
    """Return the scores of answers whose first tokens are of one pass and the others of another."""
    first, rest = (
        [scores.metrics[f"{name}_{side}_{k}"] for name in ("correct", "loss")]
        for scores, side in ((before, "before"), (after, "after"))
    )
    metrics = {"correct": (first[0] * rest[0]).bool(), "loss": first[1] + rest[1]}
    return replace(after, metrics=metrics)


def _costs(
    k: int,
    few_shot: Sequence[Sequence[int]],
    zero: Sequence[Sequence[int]],
    lengths: Int[Tensor, " example"],
) -> dict[str, Int[Tensor, " example"]]:
    """Return what answers cost whose first ``k`` tokens are few-shot, by name."""
    n_few, n_zero = (torch.tensor([len(ids) for ids in some]) for some in (few_shot, zero))
    first = lengths.clamp(max=k)
    rest = lengths - first
    # The last token of each stage is not run in it.
    begun = torch.where(first > 0, n_few + first - 1, 0)
    ended = torch.where(rest > 0, n_zero + lengths - 1, 0)
    uncached = first * n_few + _below(first) + rest * n_zero + _below(lengths) - _below(first)
    attended = _below(begun + 1) + _below(ended + 1)
    return {"tokens": begun + ended, "tokens_uncached": uncached, "attended": attended}


def _below(n: Int[Tensor, " example"]) -> Int[Tensor, " example"]:
    """Return the sum of the numbers from 0 to ``n - 1``."""
    return n * (n - 1) // 2


def _check_inside(hooks: Sequence[Hook], n_tokens: int) -> None:
    """Raise ``ValueError`` if an intervention is outside prompts of so many tokens."""
    for hook in hooks:
        position = hook.position if isinstance(hook, Intervention) else None
        if isinstance(position, int | tuple):
            row_indices(position, [n_tokens], n_tokens)


def _earlier(hook: Hook, k: int) -> Hook:
    """Return an intervention on a prompt as one on the prompt and ``k`` tokens after it."""
    if not isinstance(hook, Intervention):
        return hook
    return altered(hook, position=_moved(hook.position, k))


def _moved(position: Position, k: int) -> Position:
    if isinstance(position, Each):
        return Each(tuple(place - k for place in position.from_end))
    if isinstance(position, tuple):
        return tuple(place - k if place < 0 else place for place in position)
    if isinstance(position, int) and position < 0:
        return position - k
    return position
