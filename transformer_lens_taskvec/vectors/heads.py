"""Attention heads: the effect of each on a task, and function vectors made of the top heads.

In prompts with shuffled labels, a head's output at the last prompt token is replaced by its mean
over clean few-shot prompts; the change in the answer's probability is the head's average indirect
effect (AIE). The sum of what the top heads add to the residual stream, in the mean over the clean
prompts, is the task's *function vector*: added to the residual stream of a zero-shot prompt, it
makes the model do the task (Todd et al. 2023).

A head adds its output through its own part of ``W_O``. In some models a norm follows (Gemma 2 and
3, OLMo 2 and 3), or a multiplier (Granite): then what attention adds is ``factors * (z / scale @
W_O)``, with the norm's scale in the unedited pass of each prompt, and the heads still sum to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import pandas as pd
import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from transformer_lens_taskvec._utils.frames import grid_frame
from transformer_lens_taskvec._utils.metrics import Metric
from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec.activations import check_finite, collect, source_of
from transformer_lens_taskvec.interventions.intervention import inject
from transformer_lens_taskvec.interventions.variants import Variant
from transformer_lens_taskvec.models.layouts import check_readable, position_shapes
from transformer_lens_taskvec.prompts import AnyEpisode, shuffle_labels
from transformer_lens_taskvec.scoring import (
    LOSS_LABELS,
    Scores,
    evaluate_many,
    intervals_by_task,
    mean_by_task,
    stack,
)
from transformer_lens_taskvec.vectors.base import TaskVectors, warn_of_shared
from transformer_lens_taskvec.vectors.outputs import head_means, what_heads_add
from transformer_lens_taskvec.vectors.screening import check_screen, estimated_effects


@dataclass(frozen=True, repr=False)
class HeadEffects(Shown):
    """The change in the answers when a head is patched or ablated; NaN where none was measured.

    Attributes:
        by_task: ``[task, layer, head]``, the mean change in each metric: ``probability``,
            ``log_probability`` (nats) and the metrics asked for; where answers are numbers,
            ``loss`` in place of the two probabilities.
        interval: ``[task, layer, head, 2]``, the 95 % interval of the change in log-probability, or
            in loss where answers are numbers: Student's over distinct queries, with a correction
            for skewness; NaN of a single query.
        baseline: Scores of the same prompts with no head changed.
        means: ``[task, layer, head, d_head]``, each head's mean output over the clean prompts.
        ablation: ``"zero"`` or ``"mean"``; None if means were patched into shuffled prompts.
        scaled: ``[task, layer, head, d_head]``, the same of each prompt's outputs over the root
            mean square of what they project to together, which counts where a norm follows; None
            without ``W_O``.
        estimate: ``[task, layer, head]``, the first-order estimate of the effect on the answer's
            probability that heads were screened by; None if all were measured.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> tv.head_effects(tv.load_model("toy"), episodes).probability.shape  # [layer, head]
        torch.Size([4, 4])
    """

    by_task: Mapping[str, Float[Tensor, "task layer head"]]
    interval: Float[Tensor, "task layer head 2"]
    baseline: Scores
    means: Float[Tensor, "task layer head d_head"]
    ablation: str | None
    scaled: Float[Tensor, "task layer head d_head"] | None
    estimate: Float[Tensor, "task layer head"] | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names."""
        return self.baseline.tasks

    @property
    def measured(self) -> Bool[Tensor, "layer head"]:
        """``[layer, head]``, whether the head's effects were measured."""
        return ~self.gain.isnan().all(dim=0)

    @property
    def probability(self) -> Float[Tensor, "layer head"]:
        """``[layer, head]``, the mean over tasks of the effect on the answer's probability.

        Raises:
            KeyError: If answers are numbers, which have no probability.
        """
        return self.mean("probability")

    @property
    def log_probability(self) -> Float[Tensor, "layer head"]:
        """The same for the log-probability, in nats."""
        return self.mean("log_probability")

    @property
    def gain(self) -> Float[Tensor, "task layer head"]:
        """``[task, layer, head]``, the decrease in loss."""
        if "log_probability" in self.by_task:
            return self.by_task["log_probability"]
        return -self.by_task["loss"]

    def mean(self, metric: str) -> Float[Tensor, "layer head"]:
        """Return ``[layer, head]``, the mean over tasks of the effect on a metric.

        Raises:
            KeyError: If it was not measured.
        """
        if metric not in self.by_task:
            raise KeyError(f"no effects on {metric!r}; there are: {', '.join(self.by_task)}")
        return reduce(self.by_task[metric], "task layer head -> layer head", "mean")

    def top(self, n: int) -> tuple[tuple[int, int], ...]:
        """Return the ``n`` heads that matter most to the answers, as (layer, head).

        These are the heads whose means help most or, under ablation, whose absence does most harm,
        measured by the answer's probability, or by the loss where answers are numbers.

        Raises:
            ValueError: If fewer heads were measured.
        """
        helps = self.probability if "probability" in self.by_task else -self.mean("loss")
        effects = helps if self.ablation is None else -helps
        measured = int((~effects.isnan()).sum())
        if not 1 <= n <= measured:
            there_are = f"{measured} of {effects.numel()} were measured"
            if measured == effects.numel():
                there_are = f"the model has {measured}"
            raise ValueError(f"{n} heads are asked for; {there_are}")
        effects = effects.nan_to_num(-torch.inf)
        best = rearrange(effects, "layer head -> (layer head)").topk(n).indices.tolist()
        return tuple(divmod(index, effects.shape[1]) for index in best)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per task, layer and head: the effects, ``low, high, n, n_distinct``.

        After screening there is a column ``estimate``, and effects that were not measured are NaN.
        """
        own = [self.baseline.of(task) for task in self.tasks]
        columns = {
            **self.by_task,
            "low": self.interval[..., 0],
            "high": self.interval[..., 1],
            "n": torch.tensor([[[len(one)]] for one in own]),
            "n_distinct": torch.tensor([[[one.n_distinct]] for one in own]),
        }
        if self.estimate is not None:
            columns["estimate"] = self.estimate
        layers, heads = self.means.shape[1:3]
        return grid_frame(
            {"task": self.tasks, "layer": range(layers), "head": range(heads)}, columns
        )

    def __repr__(self) -> str:
        metric = "probability" if "probability" in self.by_task else "loss"
        effects = self.mean(metric)
        best = ", ".join(
            f"{layer}.{head} {float(effects[layer, head]):+.3f}"
            for layer, head in self.top(min(5, int(self.measured.sum())))
        )
        screened = ""
        if self.estimate is not None:
            screened = f", {int(self.measured.sum())} of {effects.numel()} heads measured"
        what = "means in shuffled prompts" if self.ablation is None else f"{self.ablation} ablation"
        name = "P(answer)" if metric == "probability" else LOSS_LABELS[self.baseline.loss_kind]
        return f"HeadEffects({what}, {len(self.tasks)} tasks{screened}; largest on {name}: {best})"


def head_effects(
    model: Any,
    episodes: Sequence[AnyEpisode],
    *,
    on: Sequence[AnyEpisode] | None = None,
    ablation: str | None = None,
    position: int | None = -1,
    screen: int | None = None,
    metrics: Iterable[str | Metric] = (),
    seed: int = 0,
    max_tokens: int | None = None,
    progress: bool = False,
) -> HeadEffects:
    """Return the effect of every attention head on the answers.

    By default each head's mean output over clean prompts replaces its output in prompts with
    shuffled labels: the average indirect effect (Todd et al. 2023). With ``ablation`` each head
    is ablated in the clean prompts instead (Han et al. 2025, Figures 17 and 18).

    Args:
        model: A model with attention heads (``attn.hook_z``).
        episodes: Clean few-shot episodes that the means are taken from.
        on: Clean episodes of the same tasks to measure on; by default those of the second half of
            each task's queries, with the means taken from the first half, so that no answer leaks
            into its own measurement.
        ablation: None, ``"zero"``, or ``"mean"`` (the mean over all tasks).
        position: Where the head is changed: -1, the last prompt token, is by far the fastest;
            None changes it at every token. Means always come from the last prompt token.
        screen: How many heads to measure, for large models: all are estimated by attribution
            patching (one backward pass), and those with the largest absolute effect on the answer's
            probability, in the mean over tasks, are measured. None measures all.
        metrics: Further metrics, as for :func:`evaluate_many`.
        seed: Seed of the shuffling.
        max_tokens: As for :func:`evaluate`.
        progress: Whether to show progress bars.

    Returns:
        Effects on the answer's probability and log-probability, ``[layer, head]``, or on the loss
        where answers are numbers: the changed prompt minus the unchanged one, so that a head whose
        ablation harms has a negative effect on probability.

    Raises:
        ValueError: If ``ablation`` is unknown, a task has only one query and there is no ``on``, an
            episode has too few demonstrations to shuffle (without ablation), a task of ``on``
            has no clean episodes, ``screen`` is not from 1 to the number of heads, heads are to
            be screened where answers are numbers, under hooks of the caller's or without
            gradients, or as for :func:`collect` and :func:`evaluate`.

    Warns:
        UserWarning: If clean episodes share their demonstrations.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> tv.head_effects(model, episodes).top(1)  # (layer, head) of the largest effect
        ((1, 0),)
        >>> ablated = tv.head_effects(model, episodes, ablation="zero")
        >>> bool(ablated.log_probability[1, 0] < -1)  # nats: the head is needed, too
        True
        >>> tv.head_effects(model, episodes, screen=3).top(1)  # 3 of 16 heads measured
        ((1, 0),)
    """
    if ablation not in (None, "zero", "mean"):
        raise ValueError(f"ablation is {ablation!r}; it must be None, 'zero' or 'mean'")
    clean, measured = (episodes, on) if on is not None else _halves(episodes)
    if ablation is None:
        measured = shuffle_labels(measured, seed)
    missing = {episode.task for episode in measured} - {episode.task for episode in clean}
    if missing:
        raise ValueError(f"no clean episodes for {', '.join(sorted(missing))}")
    if screen is not None:
        _, names = check_readable(model, None, "z")
        n_all = len(names) * position_shapes(model, names)[names[0]][0]
        check_screen(model, measured, screen, n_all)
    found = collect(model, clean, hook="z", progress=progress)
    check_finite(found)
    warn_of_shared(found)
    means, scaled = head_means(model, found)
    mean = reduce(means, "task layer head d -> layer head d", "mean")
    fixed = {"zero": torch.zeros_like(mean), "mean": mean}
    patches = {
        task: own if ablation is None else fixed[ablation]
        for task, own in zip(found.tasks, means, strict=True)
    }
    places, estimate = list(product(*map(range, mean.shape[:2]))), None
    if screen is not None:
        estimate = estimated_effects(
            model, measured, patches, position=position, max_tokens=max_tokens, progress=progress
        )
        best = reduce(estimate.abs(), "task layer head -> (layer head)", "mean").topk(screen)
        places = [places[index] for index in sorted(best.indices.tolist())]

    def variants_of(task: str) -> list[Variant]:
        edits = [
            inject(patches[task][place], place[0], hook="z", head=place[1], position=position)
            for place in places
        ]
        return [[], *([edit] for edit in edits)]

    def spread(values: Float[Tensor, "place task *rest"]) -> Float[Tensor, "task layer head *rest"]:
        layers, heads = torch.tensor(places).T
        whole = torch.full((*mean.shape[:2], *values.shape[1:]), torch.nan)
        whole[layers, heads] = values.float()
        return rearrange(whole, "layer head task ... -> task layer head ...")

    baseline, *scores = evaluate_many(
        model, measured, variants_of, metrics=metrics, max_tokens=max_tokens, progress=progress
    )
    order = [found.tasks.index(task) for task in baseline.tasks]
    before, after = _of_answers([baseline]), _of_answers(scores)
    change = {name: after[name] - before[name] for name in after}
    loss = change["log_probability" if baseline.loss_kind == "nll" else "loss"]
    intervals = intervals_by_task(loss, baseline)
    return HeadEffects(
        {name: spread(mean_by_task(values, baseline)) for name, values in change.items()},
        spread(intervals),
        baseline,
        means[order],
        ablation,
        None if scaled is None else scaled[order],
        estimate,
    )


def function_vectors(
    model: Any,
    episodes: Sequence[AnyEpisode],
    n_heads: int = 10,
    *,
    effects: HeadEffects | None = None,
    heads: Sequence[tuple[int, int]] | None = None,
    seed: int = 0,
    max_tokens: int | None = None,
    progress: bool = False,
) -> TaskVectors:
    """Return each task's function vector: what the top heads add to the residual stream.

    It is a mean over the clean prompts, and the same at every layer. It is added to the residual
    stream of zero-shot prompts about a third of the way up: ``vectors.inject("antonyms", layer)``
    (Todd et al. 2023).

    Args:
        model: A model with attention heads and ``blocks[l].attn.W_O``.
        episodes: Clean few-shot episodes; with several tasks the heads are those that serve tasks
            in general.
        n_heads: How many heads to sum, chosen by their mean effect over tasks.
        effects: From :func:`head_effects` without ablation, to save measuring them again; then
            ``episodes`` are recorded in the source, and a few of them show how a head's output
            reaches the residual stream.
        heads: Pairs of layer and head to sum, whatever their effects; nothing is measured then.
        seed: Seed of the shuffling.
        max_tokens: As for :func:`evaluate`.
        progress: Whether to show progress bars.

    Returns:
        The vectors, with the summed heads in ``source.heads``, the most effective first, and the
        mode ``"add"``.

    Raises:
        ValueError: If the model has fewer heads, or not these, ``heads`` and ``effects`` are both
            given, what attention adds to its residual stream is not
            the sum of the heads' outputs, or as for :func:`head_effects`.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> sizes = {"train": 10, "test": 10}
        >>> sets = tv.sample_splits(tv.bitwise_tasks(null=False), sizes, n_shots=4, seed=0)
        >>> vectors = tv.function_vectors(model, sets["train"], n_heads=2)
        >>> vectors["XOR", 1].shape, vectors.source.heads[0], vectors.source.mode
        (torch.Size([64]), (1, 0), 'add')
        >>> xor = [e for e in tv.zero_shot(sets["test"]) if e.task == "XOR"]
        >>> plain, added = tv.evaluate_many(model, xor, [[], vectors.inject("XOR", layer=1)])
        >>> added.mean_loss < plain.mean_loss
        True
    """
    if heads is not None:
        if effects is not None:
            raise ValueError("heads and effects are both given; give one, effects to choose heads")
        heads = _checked(model, heads)
        found = collect(model, episodes, hook="z", progress=progress)
        means, scaled = head_means(model, found)
        tasks, bos = found.tasks, found.source.bos
    else:
        if effects is None:
            effects = head_effects(
                model, episodes, seed=seed, max_tokens=max_tokens, progress=progress
            )
        if effects.ablation is not None:
            raise ValueError(
                f"these are effects of {effects.ablation} ablation; a function vector sums heads "
                "whose means help in shuffled prompts, so use head_effects(..., ablation=None)"
            )
        heads, means, scaled = effects.top(n_heads), effects.means, effects.scaled
        tasks, bos = effects.tasks, effects.baseline.bos
    layers = sorted({layer for layer, _ in heads})
    added = what_heads_add(model, episodes, means, scaled, layers)
    total = torch.zeros(len(tasks), int(model.cfg.d_model))
    for layer, head in heads:
        total += added[:, layers.index(layer), head]
    n_layers = int(model.cfg.n_layers)
    everywhere = repeat(total, "task d_model -> task layer d_model", layer=n_layers)
    source = source_of(
        model, episodes, hook="resid_post", position=-1, bos=bos, mode="add", heads=heads
    )
    return TaskVectors(everywhere, tasks, tuple(range(n_layers)), source)


def _checked(model: Any, heads: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return heads, each of which the model has."""
    shape = int(model.cfg.n_layers), int(model.cfg.n_heads)
    pairs = [tuple(one) if isinstance(one, Sequence) else (one,) for one in heads]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"heads is {list(heads)}; give pairs of layer and head")
    found = tuple((int(layer), int(head)) for layer, head in pairs)
    missing = [
        one for one in found if not all(0 <= at < n for at, n in zip(one, shape, strict=True))
    ]
    if missing or len(set(found)) < len(found) or not found:
        raise ValueError(
            f"heads is {list(found)}; give one or more pairs of layer and head, each once, below "
            f"{shape[0]} and {shape[1]}"
        )
    return found


def _of_answers(scores: Sequence[Scores]) -> dict[str, Float[Tensor, "variant example"]]:
    """Return the metrics that effects are measured in: probabilities, or loss for numbers."""
    metrics = {name: values.double() for name, values in stack(scores).items()}
    loss, _ = metrics.pop("loss"), metrics.pop("correct")
    if scores[0].loss_kind != "nll":
        return {"loss": loss, **metrics}
    return {"probability": (-loss).exp(), "log_probability": -loss, **metrics}


def _halves(episodes: Sequence[AnyEpisode]) -> tuple[list[AnyEpisode], list[AnyEpisode]]:
    """Return the episodes of the first and of the second half of each task's distinct queries."""
    by_task: dict[str, dict[int, list[AnyEpisode]]] = {}
    for episode in episodes:
        by_task.setdefault(episode.task, {}).setdefault(episode.query_id, []).append(episode)
    halves: tuple[list[AnyEpisode], list[AnyEpisode]] = [], []
    for task, queries in by_task.items():
        if len(queries) < 2:
            raise ValueError(
                f"task {task!r} has one distinct query; give two or more, for the means and for "
                "the measurement, or give on=..."
            )
        for place, some in enumerate(queries.values()):
            halves[place >= (len(queries) + 1) // 2].extend(some)
    return halves
