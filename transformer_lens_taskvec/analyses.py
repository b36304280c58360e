"""Sweeps over layers, tasks and vectors: where a task vector works, and what it does elsewhere.

All of them are variants given to :func:`~transformer_lens_taskvec.evaluate.evaluate_many`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from transformer_lens_taskvec.collect import layer_index
from transformer_lens_taskvec.controls import controls as make_controls
from transformer_lens_taskvec.engine import Variant
from transformer_lens_taskvec.evaluate import Scores, evaluate_by_task, evaluate_many
from transformer_lens_taskvec.interventions import Mode, inject
from transformer_lens_taskvec.prompts import AnyEpisode
from transformer_lens_taskvec.shown import Shown
from transformer_lens_taskvec.statistics import (
    bootstrap_interval,
    cross_fitted_best,
    wilson_interval,
)
from transformer_lens_taskvec.vectors import TaskVectors


@dataclass(frozen=True, repr=False)
class LayerSweep(Shown):
    """Scores with each task's own vector injected, by layer.

    Attributes:
        correct: ``[scale, layer, example]``.
        nll: ``[scale, layer, example]``, of the whole answer, in nats.
        baseline: The same episodes without intervention.
        layers: The layers, counted from 0.
        scales: What the vectors were multiplied with.
        controls: The same sweep, at the first scale, with each control in the vectors' place.
    """

    correct: Bool[Tensor, "scale layer example"]
    nll: Float[Tensor, "scale layer example"]
    baseline: Scores
    layers: tuple[int, ...]
    scales: tuple[float, ...]
    controls: Mapping[str, LayerSweep] = field(default_factory=dict)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names."""
        return self.baseline.tasks

    @property
    def accuracy(self) -> Float[Tensor, "layer task"]:
        """``[layer, task]`` accuracy, at the first scale."""
        return self._by_task(self.correct[0].double())

    @property
    def mean_nll(self) -> Float[Tensor, "layer task"]:
        """``[layer, task]`` mean NLL of the answers in nats, at the first scale."""
        return self._by_task(self.nll[0].double())

    @property
    def baseline_accuracy(self) -> Float[Tensor, " task"]:
        """``[task]`` accuracy without intervention."""
        return self._by_task(self.baseline.correct[None].double())[0]

    def scores_at(self, layer: int) -> Scores:
        """The scores of every episode at one layer and the first scale.

        Raises:
            ValueError: If the layer is not in the sweep.
        """
        at = layer_index(self.layers, layer)
        return replace(self.baseline, correct=self.correct[0, at], nll=self.nll[0, at])

    def at_scale(self, scale: float) -> LayerSweep:
        """The sweep of one scale alone.

        Raises:
            ValueError: If it was not among the scales.
        """
        if scale not in self.scales:
            raise ValueError(f"scale {scale} is not among the scales {list(self.scales)}")
        at = [self.scales.index(scale)]
        return replace(self, correct=self.correct[at], nll=self.nll[at], scales=(scale,))

    def best_layer(self, task: str | None = None) -> int:
        """The layer with the highest accuracy of a task, or of the mean over tasks.

        Of layers with the same accuracy, the one with the lowest NLL. Report the accuracy there
        on other episodes than those the layer was chosen on.

        Raises:
            ValueError: If there is no such task.
        """
        if task is not None and task not in self.tasks:
            raise ValueError(f"no task {task!r} in this sweep; there are: {', '.join(self.tasks)}")
        columns = slice(None) if task is None else [self.tasks.index(task)]
        accuracy = self.accuracy[:, columns].mean(dim=1)
        nll = self.mean_nll[:, columns].mean(dim=1)
        best = accuracy == accuracy.max()
        return self.layers[int(nll.masked_fill(~best, float("inf")).argmin())]

    @property
    def held_out(self) -> float:
        """The mean accuracy at the best layer of the first scale, on other episodes.

        Every other episode of each task chooses the layer, the rest are counted there, and the
        other way round.
        """
        return float(cross_fitted_best(self.correct[0].float(), self.baseline.labels))

    def at(self, layer: int) -> dict[str, float]:
        """The accuracy of each task at one layer, by its number in the model."""
        row = self.accuracy[layer_index(self.layers, layer)]
        return dict(zip(self.tasks, row.tolist(), strict=True))

    def to_frame(self) -> pd.DataFrame:
        """One row a scale, layer and task, with the score without intervention beside it.

        ``low`` and ``high`` are Wilson's 95 % interval of the accuracy. Where there are controls,
        each has its accuracy in a column ``control: ...``.
        """
        baseline_nll = self._by_task(self.baseline.nll[None].double())[0]
        sizes = torch.bincount(self.baseline.labels, minlength=len(self.tasks))
        rows = []
        for scale in self.scales:
            sweep = self.at_scale(scale)
            accuracy, nll = sweep.accuracy, sweep.mean_nll
            low, high = wilson_interval(accuracy, sizes)
            rows += [
                {
                    "scale": scale,
                    "layer": layer,
                    "task": task,
                    "accuracy": float(accuracy[row, column]),
                    "low": float(low[row, column]),
                    "high": float(high[row, column]),
                    "nll": float(nll[row, column]),
                    "baseline_accuracy": float(self.baseline_accuracy[column]),
                    "baseline_nll": float(baseline_nll[column]),
                    "n": int(sizes[column]),
                    **{
                        f"control: {kind}": float(control.accuracy[row, column])
                        for kind, control in self.controls.items()
                    },
                }
                for row, layer in enumerate(self.layers)
                for column, task in enumerate(self.tasks)
            ]
        return pd.DataFrame(rows)

    def _by_task(self, values: Float[Tensor, "layer example"]) -> Float[Tensor, "layer task"]:
        labels = self.baseline.labels
        columns = [values[:, labels == index].mean(dim=1) for index in range(len(self.tasks))]
        return torch.stack(columns, dim=1)

    def __repr__(self) -> str:
        lines = []
        for task in self.tasks:
            layer = self.best_layer(task)
            before = self.baseline.of(task).accuracy
            lines.append(f"{task} {before:.2f} -> {self.at(layer)[task]:.2f} (layer {layer})")
        return (
            f"LayerSweep({len(self.layers)} layers; {'; '.join(lines)}; mean at the best layer, on "
            f"episodes it was not chosen on: {self.held_out:.2f})"
        )


@dataclass(frozen=True, repr=False)
class PerturbationMatrix(Shown):
    """What each task's vector does to the episodes of each task (the paper's Figure 7).

    Attributes:
        nll: ``[source, target]``, change in the mean NLL of the source task's answers, in nats,
            when the target task's vector is injected.
        accuracy: ``[source, target]``, change in the source task's accuracy.
        nll_interval: ``[source, target, 2]``, the 95 % interval of ``nll`` by a bootstrap.
        sources: The tasks of the episodes.
        targets: The tasks of the vectors.
        layer: The layer of the injection.
        baseline: The episodes without intervention.
    """

    nll: Float[Tensor, "source target"]
    accuracy: Float[Tensor, "source target"]
    nll_interval: Float[Tensor, "source target 2"]
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    layer: int
    baseline: Scores

    @property
    def conditional_decoding(self) -> float:
        """Mean change in NLL off the diagonal less the mean on it, in nats.

        It tells how far the answers depend on the vector being the right one.
        """
        own = torch.tensor([[s == t for t in self.targets] for s in self.sources])
        return float(self.nll[~own].mean() - self.nll[own].mean())

    def to_frame(self) -> pd.DataFrame:
        """One row a source and target: ``source, target, nll, nll_low, nll_high, accuracy``.

        They are changes; the interval is ``nll_interval``.
        """
        return pd.DataFrame(
            [
                {
                    "source": source,
                    "target": target,
                    "nll": float(self.nll[row, column]),
                    "nll_low": float(self.nll_interval[row, column, 0]),
                    "nll_high": float(self.nll_interval[row, column, 1]),
                    "accuracy": float(self.accuracy[row, column]),
                }
                for row, source in enumerate(self.sources)
                for column, target in enumerate(self.targets)
            ]
        )

    def __repr__(self) -> str:
        return (
            f"PerturbationMatrix(layer {self.layer}, {len(self.sources)} sources x "
            f"{len(self.targets)} targets; conditional decoding "
            f"{self.conditional_decoding:.3f} of {self.baseline.loss})"
        )


@dataclass(frozen=True, repr=False)
class SteeringEffect(Shown):
    """Accuracy unperturbed, with the right task's vector, and with Null's (the paper's Figure 20).

    Attributes:
        unperturbed: ``[example]`` scores of the model as it is.
        positive: The right task's vector injected.
        negative: The Null task's vector injected.
        layer: The layer of the injection.
    """

    unperturbed: Scores
    positive: Scores
    negative: Scores
    layer: int

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names."""
        return self.unperturbed.tasks

    def to_frame(self) -> pd.DataFrame:
        """One row a task: ``task, unperturbed, positive, negative, n``.

        Beside each accuracy stand ``..._low`` and ``..._high``, Wilson's 95 % interval.
        """
        rows = []
        for task in self.tasks:
            row: dict[str, Any] = {"task": task}
            for kind in ("unperturbed", "positive", "negative"):
                scores: Scores = getattr(self, kind).of(task)
                row[kind] = scores.accuracy
                row[f"{kind}_low"], row[f"{kind}_high"] = scores.interval()
                row["n"] = len(scores)
            rows.append(row)
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        lines = [
            f"{row.task} {row.negative:.2f} < {row.unperturbed:.2f} > {row.positive:.2f}"
            for row in self.to_frame().itertuples()
        ]
        return f"SteeringEffect(layer {self.layer}; negative, none, positive: {'; '.join(lines)})"


def layer_sweep(
    model: Any,
    episodes: Sequence[AnyEpisode],
    vectors: TaskVectors,
    *,
    mode: Mode = "replace",
    scales: Sequence[float] = (1.0,),
    controls: bool | Mapping[str, TaskVectors] = False,
    position: int | Sequence[int] | None = -1,
    stop: str | None = None,
    max_tokens: int | None = None,
    progress: bool = False,
) -> LayerSweep:
    """Inject each episode's own task vector, at one layer at a time.

    Args:
        model: The model that the vectors come from.
        episodes: Usually zero-shot ones, with other queries than the vectors were taken from.
        vectors: Their layers are the layers of the sweep, their hook point is the one injected at.
        mode: As for :func:`~transformer_lens_taskvec.interventions.inject`.
        scales: What the vectors are multiplied with, one sweep each.
        controls: Vectors to inject in the task vectors' place, from
            :func:`~transformer_lens_taskvec.controls.controls`; True for those that are made of the
            vectors alone. They are at the first scale.
        position: Where to inject; -1, the last prompt token, is by far the fastest.
        stop: As for :func:`~transformer_lens_taskvec.evaluate.evaluate`.
        max_tokens: As for :func:`~transformer_lens_taskvec.evaluate.evaluate`.
        progress: Whether to show a progress bar.

    Returns:
        Accuracy and NLL by layer and task, with those without intervention.

    Raises:
        ValueError: If a task has no vector, or the vectors are another model's.
    """
    vectors.check_model(model)
    if isinstance(controls, bool):
        controls = make_controls(vectors) if controls else {}
    sweeps = [(vectors, scale) for scale in scales]
    sweeps += [(control, scales[0]) for control in controls.values()]

    def variants_of(task: str) -> list[Variant]:
        return [[]] + [
            [
                inject(
                    vector,
                    layer,
                    mode=mode,
                    scale=scale,
                    position=position,
                    hook=vectors.source.hook,
                )
            ]
            for swept, scale in sweeps
            for layer, vector in zip(vectors.layers, swept[task], strict=True)
        ]

    _check_tasks([episode.task for episode in episodes], vectors)
    baseline, *scores = evaluate_by_task(
        model,
        episodes,
        variants_of,
        stop=stop,
        prepend_bos=vectors.source.prepend_bos,
        max_tokens=max_tokens,
        progress=progress,
    )
    grid = (len(sweeps), len(vectors.layers), len(episodes))
    correct = torch.stack([score.correct for score in scores]).view(grid)
    nll = torch.stack([score.nll for score in scores]).view(grid)
    n = len(scales)

    def part(rows: slice, of: Sequence[float], beside: Mapping[str, LayerSweep]) -> LayerSweep:
        kept = tuple(float(scale) for scale in of)
        return LayerSweep(correct[rows], nll[rows], baseline, vectors.layers, kept, beside)

    beside = {
        kind: part(slice(n + index, n + index + 1), scales[:1], {})
        for index, kind in enumerate(controls)
    }
    return part(slice(n), scales, beside)


def perturbation_matrix(
    model: Any,
    episodes: Sequence[AnyEpisode],
    vectors: TaskVectors,
    layer: int,
    *,
    mode: Mode = "replace",
    scale: float = 1.0,
    position: int | Sequence[int] | None = -1,
    stop: str | None = None,
    max_tokens: int | None = None,
) -> PerturbationMatrix:
    """Inject every task's vector into the episodes of every task (Han et al. 2025, Figure 7).

    Args:
        model: The model that the vectors come from.
        episodes: Usually few-shot ones.
        vectors: The vectors; their tasks are the columns.
        layer: The layer, counted from 0.
        mode: As for :func:`~transformer_lens_taskvec.interventions.inject`.
        scale: As for :func:`~transformer_lens_taskvec.interventions.inject`.
        position: As for :func:`~transformer_lens_taskvec.interventions.inject`.
        stop: As for :func:`~transformer_lens_taskvec.evaluate.evaluate`.
        max_tokens: As for :func:`~transformer_lens_taskvec.evaluate.evaluate`.

    Returns:
        Changes in NLL and accuracy, ``[source task, target vector]``.

    Raises:
        ValueError: If there is no such layer, or the vectors are another model's.
    """
    vectors.check_model(model)
    edits: dict[str, Variant] = {
        task: [
            inject(
                vectors.at(task, layer),
                layer,
                mode=mode,
                scale=scale,
                position=position,
                hook=vectors.source.hook,
            )
        ]
        for task in vectors.tasks
    }
    bos = vectors.source.prepend_bos
    return matrix_of_edits(
        model, episodes, edits, layer, stop=stop, prepend_bos=bos, max_tokens=max_tokens
    )


def matrix_of_edits(
    model: Any,
    episodes: Sequence[AnyEpisode],
    edits: Mapping[str, Variant],
    layer: int,
    *,
    stop: str | None = None,
    prepend_bos: bool = False,
    max_tokens: int | None = None,
) -> PerturbationMatrix:
    """A perturbation matrix of any edits, one column each.

    Args:
        model: Any model with TransformerLens' hook API.
        episodes: The episodes; their tasks are the rows.
        edits: For each target the interventions that stand for it.
        layer: The layer they act in, for the record.
        stop: As for :func:`~transformer_lens_taskvec.evaluate.evaluate`.
        prepend_bos: As for :func:`~transformer_lens_taskvec.evaluate.evaluate`.
        max_tokens: As for :func:`~transformer_lens_taskvec.evaluate.evaluate`.
    """
    scores = evaluate_many(
        model,
        episodes,
        [[], *edits.values()],
        stop=stop,
        prepend_bos=prepend_bos,
        max_tokens=max_tokens,
    )
    tasks = scores[0].tasks
    own = [scores[0].labels == index for index in range(len(tasks))]
    before, after = scores[0], scores[1:]
    nll = torch.stack([s.nll.double() for s in after]) - before.nll.double()
    accuracy = torch.stack([s.correct.double() for s in after]) - before.correct.double()
    return PerturbationMatrix(
        torch.stack([nll[:, rows].mean(dim=1) for rows in own]),
        torch.stack([accuracy[:, rows].mean(dim=1) for rows in own]),
        torch.stack([bootstrap_interval(nll[:, rows]) for rows in own]),
        tasks,
        tuple(edits),
        layer,
        scores[0],
    )


def steering_effect(
    model: Any,
    episodes: Sequence[AnyEpisode],
    vectors: TaskVectors,
    layer: int,
    null: str = "Null",
    *,
    mode: Mode = "replace",
    scale: float = 1.0,
    stop: str | None = None,
    max_tokens: int | None = None,
) -> SteeringEffect:
    """Accuracy unperturbed, with the right task's mean, and with Null's (the paper's Figure 20).

    Args:
        model: The model that the vectors come from.
        episodes: Episodes of tasks that have vectors.
        vectors: The vectors, Null's among them.
        layer: The layer, counted from 0.
        null: The name of the task whose vector carries no task.
        mode: As for :func:`~transformer_lens_taskvec.interventions.inject`.
        scale: As for :func:`~transformer_lens_taskvec.interventions.inject`.
        stop: As for :func:`~transformer_lens_taskvec.evaluate.evaluate`.
        max_tokens: As for :func:`~transformer_lens_taskvec.evaluate.evaluate`.

    Returns:
        The three scores of every episode.

    Raises:
        ValueError: If a task or ``null`` has no vector, or there is no such layer.
    """
    vectors.check_model(model)
    _check_tasks([*(episode.task for episode in episodes), null], vectors)
    variants_of = steering_variants(vectors, layer, null, mode=mode, scale=scale)
    unperturbed, positive, negative = evaluate_by_task(
        model,
        episodes,
        lambda task: [[], *variants_of(task)],
        stop=stop,
        prepend_bos=vectors.source.prepend_bos,
        max_tokens=max_tokens,
    )
    return SteeringEffect(unperturbed, positive, negative, layer)


def steering_variants(
    vectors: TaskVectors, layer: int, null: str, *, mode: Mode = "replace", scale: float = 1.0
) -> Callable[[str], list[Variant]]:
    """For each task the positive and the negative intervention: its own vector, and Null's."""
    hook = vectors.source.hook

    def variants_of(task: str) -> list[Variant]:
        return [
            [inject(vectors.at(name, layer), layer, mode=mode, scale=scale, hook=hook)]
            for name in (task, null)
        ]

    return variants_of


def _check_tasks(tasks: Sequence[str], vectors: TaskVectors) -> None:
    missing = [task for task in dict.fromkeys(tasks) if task not in vectors.tasks]
    if missing:
        raise ValueError(
            f"no vector for {', '.join(missing)}; the vectors are of: {', '.join(vectors.tasks)}"
        )
