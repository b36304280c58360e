"""How close answers under interventions are to those after real demonstrations.

The yardstick is the distribution of each answer token after a few-shot prompt. It is compared with
that after the query alone, with and without interventions, along the same answer: position 0 is
the prompt's last token, which predicts the answer's first, and then the answer is fed in. Measured
by position, this shows how soon demonstrations stop mattering (Liu et al. 2024, PICA).

With the few-shot model's distribution ``q`` and a variant's ``p``, a speculative decoder with the
variant as its draft keeps a token with probability ``sum_x min(p(x), q(x)) = 1 - TV(p, q)``, and no
unbiased decoder rejects fewer (Yin et al. 2024). What Kwon et al. (2026) ask of a task vector is a
small discrepancy of the next token's probability; it is taken here as ``|q(y) - p(y)|`` of the
token ``y`` that is fed in.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_taskvec._utils.metrics import ALWAYS, Answered
from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec._utils.statistics import change_interval, means_by_query
from transformer_lens_taskvec.analysis.forced import (
    DISTANCES,
    compare_forced,
    divergence,
    said_after,
)
from transformer_lens_taskvec.analysis.named import (
    TASK_VECTOR,
    NamedVariants,
    check_choice,
    check_few_shot,
    named_variants,
)
from transformer_lens_taskvec.interventions.variants import Variant
from transformer_lens_taskvec.models.tokens import encode_answers
from transformer_lens_taskvec.prompts import AnyEpisode, Episode, zero_shot
from transformer_lens_taskvec.scoring import Scores, evaluate, evaluate_many
from transformer_lens_taskvec.vectors.base import Injectable

FORCED = ("answer", "greedy", "sampled")
"""Which continuation is fed in: the right answer, or what the few-shot model says."""


@dataclass(frozen=True, eq=False)
class Divergence:
    """A metric: the divergence ``KL(few-shot || here)`` at the first answer token, in nats.

    Attributes:
        few_shot: For each query's number, the log-probabilities of the first answer token after
            demonstrations, ``[vocab]``; the mean probability where a query has several episodes.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> _, divergence = few_shot_answers(model, episodes)
        >>> vectors = tv.task_vectors(tv.collect(model, episodes))
        >>> xor = [e for e in tv.zero_shot(episodes) if e.task == "XOR"]
        >>> variants = [[], vectors.inject("XOR", layer=1)]
        >>> plain, injected = tv.evaluate_many(model, xor, variants, metrics=[divergence])
        >>> injected.mean("divergence") < plain.mean("divergence") / 10
        True
    """

    few_shot: Mapping[int, Float[Tensor, " vocab"]]
    __name__ = "divergence"

    def of_answered(self, answered: Answered) -> Float[Tensor, "row variant"]:
        """Return the divergence of each answer.

        Raises:
            KeyError: If a query has no few-shot distribution.
        """
        rows = []
        for query, logits in zip(answered.queries, answered.logits, strict=True):
            if query not in self.few_shot:
                raise KeyError(
                    "an episode asks a query that few_shot_answers was not given; give it few-shot "
                    "episodes of the same tasks and queries"
                )
            here = logits[:, 0].float().log_softmax(dim=-1)
            rows.append(divergence(here, self.few_shot[query].to(here)))
        return torch.stack(rows)


def few_shot_answers(
    model: Any,
    episodes: Sequence[AnyEpisode],
    *,
    stop: str | None = None,
    max_tokens: int | None = None,
) -> tuple[Scores, Divergence]:
    """Return the scores of few-shot episodes, and the metric of the divergence from their answers.

    Args:
        model: Any model with TransformerLens' hook API and a tokenizer.
        episodes: Few-shot episodes; a query is known by its task, input and answer.
        stop: As for :func:`evaluate`.
        max_tokens: As for :func:`evaluate`.

    Raises:
        ValueError: If answers are numbers, or as for :func:`evaluate`.
    """
    if episodes and isinstance(episodes[0].prompt, Tensor):
        raise ValueError("these episodes' answers are numbers, which have no distribution")
    kept = _Kept({})
    scores = evaluate(model, episodes, metrics=[kept], stop=stop, max_tokens=max_tokens)
    few_shot = {
        query: torch.stack(some).logsumexp(dim=0) - math.log(len(some))
        for query, some in kept.by_query.items()
    }
    metrics = {name: scores.metrics[name] for name in ALWAYS}
    return replace(scores, metrics=metrics), Divergence(few_shot)


@dataclass(frozen=True, eq=False)
class _Kept:
    """A metric that keeps the distributions it is given: the entropy of the first answer token."""

    by_query: dict[int, list[Tensor]]
    __name__ = "kept"

    def of_answered(self, answered: Answered) -> Float[Tensor, "row variant"]:
        logp = answered.logits[:, :, 0].float().log_softmax(dim=-1)
        for query, rows in zip(answered.queries, logp.cpu(), strict=True):
            self.by_query.setdefault(query, []).extend(rows)
        entropy: Tensor = torch.special.entr(logp.exp()).sum(dim=-1)
        return entropy


@dataclass(frozen=True, repr=False)
class IclFidelity(Shown):
    """How far variants of the zero-shot model are from the few-shot model, token by token.

    Attributes:
        distances: ``[variant, example, pos]`` by name: ``kl``, the divergence ``KL(few-shot ||
            variant)`` in nats; ``tv``, the total variation, between 0 and 1; ``discrepancy``, of
            the probability of the token that is fed in. NaN past the end of an answer.
        variants: The name of each variant and the layer it acts at, None where there is none.
        scores: How each variant answers the zero-shot queries.
        few_shot: How the few-shot episodes are answered.
        lengths: ``[example]``, the number of tokens that were fed in.
        forced: The continuation that was fed in, one of :data:`FORCED`.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> sizes = {"train": 10, "test": 10}
        >>> sets = tv.sample_splits(tv.bitwise_tasks(null=False), sizes, n_shots=4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, sets["train"]))
        >>> found = icl_fidelity(model, sets["test"], vectors=vectors, layers=[1])
        >>> summary = found.summary()
        >>> xor = summary[summary.task == "XOR"].set_index("variant")
        >>> xor.kept.round(1).to_dict()  # the share of tokens that speculative decoding keeps
        {'zero-shot': 0.8, 'task vector': 1.0, 'random': 0.8, 'other task': 0.5, 'mean': 0.5}
    """

    distances: Mapping[str, Float[Tensor, "variant example pos"]]
    variants: tuple[tuple[str, int | None], ...]
    scores: tuple[Scores, ...]
    few_shot: Scores
    lengths: Int[Tensor, " example"]
    forced: str = "answer"

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names."""
        return self.few_shot.tasks

    def index(self, variant: str, layer: int | None = None) -> int:
        """Return the place of a variant in ``variants``.

        Raises:
            ValueError: If there is no such variant.
        """
        if (variant, layer) not in self.variants:
            known = ", ".join(dict.fromkeys(name for name, _ in self.variants))
            raise ValueError(f"no variant {variant!r} at layer {layer}; there are: {known}")
        return self.variants.index((variant, layer))

    def curve(
        self, variant: str, layer: int | None = None, *, distance: str = "kl", task: str = ""
    ) -> pd.DataFrame:
        """Return a distance by position: ``position, mean, low, high, n_distinct``.

        Longer answers alone count at later positions. Intervals are 95 % intervals over distinct
        queries.

        Args:
            variant: A name in ``variants``.
            layer: The layer it acts at.
            distance: One of :data:`DISTANCES`.
            task: The task; all queries of all tasks by default.

        Raises:
            ValueError: If there is no such variant, distance or task.
        """
        check_choice("distance", distance, DISTANCES)
        if task:
            check_choice("task", task, self.tasks)
        of_task = self.few_shot.labels == self.tasks.index(task) if task else self.lengths > 0
        queries, sets = self.few_shot.queries, self.few_shot.demo_sets
        rows = []
        for position in range(int(self.lengths[of_task].max())):
            real = of_task & (self.lengths > position)
            values = self.distances[distance][self.index(variant, layer), real, position]
            means = means_by_query(values, queries[real])
            own_sets = None if sets is None else sets[real]
            low, high = change_interval(values, queries[real], own_sets).tolist()
            rows.append([position, float(means.mean()), low, high, len(means)])
        return pd.DataFrame(rows, columns=["position", "mean", "low", "high", "n_distinct"])

    def to_frame(self) -> pd.DataFrame:
        """Return one row per task, variant, layer and position.

        Columns: ``task, variant, layer, position, n_distinct``, each distance with ``..._low`` and
        ``..._high``, its 95 % interval over distinct queries, and ``kept``, the share of tokens
        that speculative decoding keeps, ``1 - tv``.
        """
        tables = []
        for task in self.tasks:
            for name, layer in self.variants:
                frames = {
                    distance: self.curve(name, layer, distance=distance, task=task)
                    for distance in DISTANCES
                }
                table = frames["kl"][["position", "n_distinct"]]
                for distance, frame in frames.items():
                    named = {"mean": distance, "low": f"{distance}_low", "high": f"{distance}_high"}
                    table = table.join(frame.rename(columns=named)[[*named.values()]])
                table = table.assign(kept=1 - table.tv)
                of = pd.DataFrame([(task, name, layer)], columns=["task", "variant", "layer"])
                tables.append(of.astype({"layer": "object"}).merge(table, how="cross"))
        return pd.concat(tables, ignore_index=True)

    def per_example(self, distance: str) -> Float[Tensor, "variant example"]:
        """Return the mean of a distance over the tokens of each episode's continuation."""
        check_choice("distance", distance, DISTANCES)
        values = self.distances[distance]
        real = torch.arange(values.shape[-1]) < self.lengths[:, None]
        means: Tensor = values.masked_fill(~real, 0.0).sum(dim=-1) / self.lengths
        return means

    def closest(self, distance: str = "kl") -> int | None:
        """Return the layer at which task vectors leave the smallest distance, over all tokens.

        Raises:
            ValueError: If there are no task vectors, or no such distance.
        """
        means = self.per_example(distance).mean(dim=1).tolist()
        found = {
            at: mean
            for (name, at), mean in zip(self.variants, means, strict=True)
            if name == TASK_VECTOR
        }
        if not found:
            raise ValueError("no vectors were injected; give icl_fidelity vectors=")
        return min(found, key=found.__getitem__)

    def summary(self) -> pd.DataFrame:
        """Return one row per task, variant and layer, with means over the answers' tokens.

        Columns: ``task, variant, layer``, each distance and ``kl_first``, the divergence at the
        separator; ``kept`` with ``kept_low`` and ``kept_high``; ``accuracy`` with its interval
        ``low`` and ``high``, the accuracy ``few_shot`` with demonstrations, and ``n_distinct``.
        """
        means = {distance: self.per_example(distance) for distance in DISTANCES}
        means["kl_first"] = self.distances["kl"][..., 0]
        rows = []
        for index, task in enumerate(self.tasks):
            of_task = self.few_shot.labels == index
            few_shot, queries = self.few_shot.of(task), self.few_shot.queries[of_task]
            for place, (name, layer) in enumerate(self.variants):
                scores = self.scores[place].of(task)
                row: dict[str, Any] = {"task": task, "variant": name, "layer": layer}
                for distance, values in means.items():
                    row[distance] = float(means_by_query(values[place, of_task], queries).mean())
                kept = 1 - means["tv"][place, of_task]
                row["kept"] = 1 - row["tv"]
                row["kept_low"], row["kept_high"] = change_interval(
                    kept, queries, few_shot.demo_sets
                ).tolist()
                row["accuracy"] = scores.accuracy
                row["low"], row["high"] = scores.interval()
                row["few_shot"], row["n_distinct"] = few_shot.accuracy, scores.n_distinct
                rows.append(row)
        layers = pd.Series([row["layer"] for row in rows], dtype=object)
        return pd.DataFrame(rows).assign(layer=layers)

    def correlation(
        self, distance: str = "kl", *, variants: Sequence[str] | None = None
    ) -> pd.DataFrame:
        """Return Spearman's rank correlation of a distance with accuracy, over tasks and variants.

        A point is a task under a variant at a layer; the distance is the mean over the answers'
        tokens. Points of one task are of the same queries, so that no p-value is given.

        Args:
            distance: One of :data:`DISTANCES`.
            variants: The variants' names; by default all.

        Returns:
            ``over, spearman, n``: over all points, and over the variants of each task alone. NaN
            where nothing varies.

        Raises:
            ValueError: If there is no such distance or variant.
        """
        from scipy.stats import spearmanr  # half a second to import

        check_choice("distance", distance, DISTANCES)
        for name in variants or ():
            check_choice("variants", name, [known for known, _ in self.variants])
        summary = self.summary()
        if variants is not None:
            summary = summary[summary.variant.isin(variants)]
        rows = []
        for over in ("all", *self.tasks):
            points = summary if over == "all" else summary[summary.task == over]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a correlation of values that do not vary is NaN
                rho = float(spearmanr(points[distance], points.accuracy).statistic)
            rows.append({"over": over, "spearman": rho, "n": len(points)})
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        summary = self.summary().groupby("variant", sort=False)
        means = summary[["kl", "kept"]].mean()
        lines = [f"{row.Index} KL {row.kl:.2f}, keeps {row.kept:.2f}" for row in means.itertuples()]
        return f"IclFidelity({'; '.join(lines)}; {self.few_shot.size})"


def icl_fidelity(
    model: Any,
    few_shot: Sequence[Episode],
    variants: NamedVariants | None = None,
    *,
    vectors: Injectable | None = None,
    layers: Sequence[int | None] | None = None,
    controls: bool | Mapping[str, Injectable] = True,
    forced: str = "answer",
    n_tokens: int = 8,
    seed: int = 0,
    stop: str | None = None,
    max_tokens: int | None = None,
) -> IclFidelity:
    """Return how far the zero-shot model under variants is from few-shot answers, by position.

    The queries of the episodes are asked again without demonstrations: as they are, under each
    variant, and with vectors at each layer. The same continuation is fed in after both prompts.

    Args:
        model: Any model with TransformerLens' hook API and a tokenizer.
        few_shot: Few-shot episodes, with other queries than vectors were taken from.
        variants: Interventions by name, or functions from a task's name to interventions.
        vectors: Task vectors, or anything else that can be injected, as one more variant per layer.
        layers: Their layers; by default all they have.
        controls: Vectors to inject in their place, from :func:`control_vectors`; True for those
            made from the vectors alone.
        forced: What is fed in: ``"answer"``, the right answer; ``"greedy"``, what the few-shot
            model says; ``"sampled"``, what it says at temperature 1, so that ``1 - tv`` averages to
            the share of tokens that speculative decoding keeps.
        n_tokens: The most tokens of what the few-shot model says, which ends with the template's
            separator or the end-of-sequence token.
        seed: Seed of the sampling and of the controls.
        stop: As for :func:`evaluate`: whether the separator is the last token of right answers.
        max_tokens: As for :func:`evaluate`.

    Raises:
        ValueError: If there are no episodes, one has no demonstrations or an answer that is a
            number, two variants have one name, ``layers`` come without ``vectors``, ``forced`` is
            unknown, ``n_tokens`` is below 1, or as for :func:`evaluate_many`.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.find_tasks(["XOR", "OR"]), 10, 4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, episodes))
        >>> variants = {"layer 1": lambda task: vectors.inject(task, layer=1)}
        >>> found = icl_fidelity(model, episodes, variants)
        >>> found.curve("zero-shot").columns.tolist()
        ['position', 'mean', 'low', 'high', 'n_distinct']
        >>> before, after = (found.curve(name)["mean"][0] for name in ("zero-shot", "layer 1"))
        >>> bool(after < before / 10)
        True
    """
    few_shot = list(few_shot)
    check_few_shot(few_shot)
    check_choice("forced", forced, FORCED)
    if n_tokens < 1:
        raise ValueError(f"n_tokens is {n_tokens}; it must be at least 1")
    zero = zero_shot(few_shot)
    named = named_variants(model, zero, variants or {}, vectors, layers, controls, seed)

    def variants_of(task: str) -> list[Variant]:
        return [list(of(task)) for of in named.values()]

    answers = encode_answers(model, few_shot, stop=stop)
    if forced != "answer":
        temperature = float(forced == "sampled")
        answers = said_after(model, few_shot, n_tokens, temperature=temperature, seed=seed)
    distances, scores = compare_forced(
        model, few_shot, zero, variants_of, answers, stop=stop, max_tokens=max_tokens
    )
    if forced != "answer":
        options: dict[str, Any] = {"stop": stop, "max_tokens": max_tokens}
        scores = [evaluate(model, few_shot, **options)]
        scores += evaluate_many(model, zero, variants_of, **options)
    lengths = torch.tensor([len(answer) for answer in answers])
    return IclFidelity(distances, tuple(named), tuple(scores[1:]), scores[0], lengths, forced)
