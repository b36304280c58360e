"""Layer sweeps: each task's own vector injected at one layer at a time.

All layers, scales and controls share one pass over the prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from transformer_lens_taskvec._utils.frames import grid_frame
from transformer_lens_taskvec._utils.metrics import Metric
from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec._utils.statistics import cross_fitted_best, means_by_query
from transformer_lens_taskvec.activations import layer_index
from transformer_lens_taskvec.controls import control_vectors
from transformer_lens_taskvec.interventions.modes import Mode
from transformer_lens_taskvec.interventions.variants import Variant
from transformer_lens_taskvec.prompts import AnyEpisode
from transformer_lens_taskvec.scoring import (
    Scores,
    evaluate_many,
    intervals_by_task,
    mean_by_task,
    stack,
)
from transformer_lens_taskvec.vectors.base import (
    OWN,
    Injectable,
    Place,
    at_place,
    check_tasks,
    check_vectors,
)


@dataclass(frozen=True, repr=False)
class LayerSweep(Shown):
    """Scores with each task's own vector injected, by layer.

    Attributes:
        metrics: By name ``[scale, layer, example]``: ``correct``, ``loss``, and those asked for.
        baseline: The same episodes without intervention.
        layers: The layers, counted from 0.
        scales: The factors that multiply the vectors.
        controls: The same sweep, at the first scale, with each control in the vectors' place.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model, tasks = tv.load_model("toy"), tv.bitwise_tasks(null=False)
        >>> sweep = tv.run_experiment(model, tasks, n_shots=4, n=12).sweep
        >>> sweep.accuracy.shape, sweep.best_layer("XOR")
        (torch.Size([4, 6]), 1)
    """

    metrics: Mapping[str, Shaped[Tensor, "scale layer example"]]
    baseline: Scores
    layers: tuple[int | None, ...]
    scales: tuple[float, ...]
    controls: Mapping[str, LayerSweep] = field(default_factory=dict)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names."""
        return self.baseline.tasks

    @property
    def correct(self) -> Bool[Tensor, "scale layer example"]:
        """Whether each episode was answered right."""
        return self.metrics["correct"]

    @property
    def loss(self) -> Float[Tensor, "scale layer example"]:
        """The loss of each episode's answer, of the kind ``baseline.loss_kind``."""
        return self.metrics["loss"]

    @property
    def accuracy(self) -> Float[Tensor, "layer task"]:
        """``[layer, task]`` accuracy, at the first scale."""
        return self.mean("correct")

    @property
    def mean_loss(self) -> Float[Tensor, "layer task"]:
        """``[layer, task]`` mean loss of the answers, at the first scale."""
        return self.mean("loss")

    @property
    def baseline_accuracy(self) -> Float[Tensor, " task"]:
        """``[task]`` accuracy without intervention."""
        return mean_by_task(self.baseline.correct, self.baseline)

    def mean(self, metric: str) -> Float[Tensor, "layer task"]:
        """Return ``[layer, task]``, the mean of a metric at the first scale.

        Raises:
            KeyError: If it was not measured.
        """
        if metric not in self.metrics:
            raise KeyError(f"no metric {metric!r}; there are: {', '.join(self.metrics)}")
        return mean_by_task(self.metrics[metric][0], self.baseline)

    def scores_at(self, layer: int | None) -> Scores:
        """Return the scores of every episode at one layer and the first scale.

        Raises:
            ValueError: If the layer is not in the sweep.
        """
        at = layer_index(self.layers, layer)
        metrics = {name: values[0, at] for name, values in self.metrics.items()}
        return replace(self.baseline, metrics=metrics, replies=None)

    def at_scale(self, scale: float) -> LayerSweep:
        """Return the sweep at one scale, with its controls if they have that scale.

        Raises:
            ValueError: If the scale is not in the sweep.
        """
        if scale not in self.scales:
            raise ValueError(f"scale {scale} is not among the scales {list(self.scales)}")
        at = [self.scales.index(scale)]
        metrics = {name: values[at] for name, values in self.metrics.items()}
        controls = self.controls if at == [0] else {}
        return replace(self, metrics=metrics, scales=(scale,), controls=controls)

    def best_layer(self, task: str | None = None) -> int | None:
        """Return the layer with the highest accuracy of a task, or of the mean over tasks.

        Ties go to the layer with the lowest loss. Report the accuracy there on other episodes than
        those the layer was chosen on.

        Raises:
            ValueError: If there is no such task.
        """
        if task is not None and task not in self.tasks:
            raise ValueError(f"no task {task!r} in this sweep; there are: {', '.join(self.tasks)}")
        columns = slice(None) if task is None else [self.tasks.index(task)]
        accuracy = reduce(self.accuracy[:, columns], "layer task -> layer", "mean")
        loss = reduce(self.mean_loss[:, columns], "layer task -> layer", "mean")
        # Means of the same answers may differ by rounding; a loss that is not a number is no loss.
        [best] = accuracy.isclose(accuracy.max()).nonzero(as_tuple=True)
        known = loss[best].nan_to_num(nan=torch.inf, posinf=torch.inf)
        return self.layers[int(best[known.argmin()])]

    def best(self, task: str) -> tuple[float, int | None]:
        """Return the scale and the layer at which a task's accuracy is highest.

        Where several are equal, the one with the lowest loss.

        Raises:
            ValueError: If there is no such task.
        """
        if task not in self.tasks:
            raise ValueError(f"no task {task!r}; there are: {', '.join(self.tasks)}")
        found = {scale: self.at_scale(scale) for scale in self.scales}
        layers = {scale: sweep.best_layer(task) for scale, sweep in found.items()}

        def rank(scale: float) -> tuple[float, float]:
            own = found[scale].scores_at(layers[scale]).of(task)
            loss = own.mean_loss
            return round(own.accuracy, 9), -loss if loss == loss else -torch.inf

        scale = max(self.scales, key=rank)
        return scale, layers[scale]

    @property
    def held_out(self) -> float:
        """The mean accuracy at the best layer of the first scale, on other queries.

        Half the queries of each task choose the layer and accuracy is measured on the other half;
        then the halves swap. Shared sets of demonstrations are halved instead, with their queries.
        """
        found = self.baseline
        units = found.queries if found.demo_sets is None else found.demo_sets
        rows = [found.labels == index for index in range(len(self.tasks))]
        by_task = [means_by_query(self.correct[0][:, own], units[own]) for own in rows]
        return float(cross_fitted_best(by_task))

    def at(self, layer: int | None) -> Float[Tensor, " task"]:
        """Return the accuracy of each task at one layer and the first scale.

        Raises:
            ValueError: If the layer is not in the sweep.
        """
        return self.accuracy[layer_index(self.layers, layer)]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per scale, layer and task, next to the score without intervention.

        A column holds the mean of each metric, and ``baseline_NAME`` its baseline; ``low`` and
        ``high`` are Wilson's 95 % interval of the accuracy, ``control: NAME`` is the accuracy of
        each control, NaN at other scales than the first, ``n`` the number of episodes, and
        ``n_distinct`` of distinct queries.
        """
        sizes = torch.bincount(self.baseline.labels, minlength=len(self.tasks))
        distinct = torch.tensor([self.baseline.of(task).n_distinct for task in self.tasks])
        named = {("accuracy" if name == "correct" else name): name for name in self.metrics}
        before = {
            column: mean_by_task(self.baseline.metrics[name], self.baseline)
            for column, name in named.items()
        }
        means = {
            column: mean_by_task(self.metrics[name], self.baseline)
            for column, name in named.items()
        }
        low, high = intervals_by_task(self.correct, self.baseline, shares=True).unbind(dim=-1)
        unknown = torch.full_like(low[1:], torch.nan)
        columns = {
            **means,
            "low": low,
            "high": high,
            **{
                f"control: {kind}": torch.cat([control.accuracy[None], unknown])
                for kind, control in self.controls.items()
            },
            **{f"baseline_{name}": values for name, values in before.items()},
            "n": sizes,
            "n_distinct": distinct,
        }
        axes = {"scale": self.scales, "layer": self.layers, "task": self.tasks}
        return grid_frame(axes, columns)

    def __repr__(self) -> str:
        lines = []
        for index, task in enumerate(self.tasks):
            layer = self.best_layer(task)
            before, after = float(self.baseline_accuracy[index]), float(self.at(layer)[index])
            lines.append(f"{task} {before:.2f} -> {after:.2f} (layer {layer})")
        return (
            f"LayerSweep({len(self.layers)} layers; {'; '.join(lines)}; mean at the best layer, on "
            f"queries it was not chosen on: {self.held_out:.2f}; {self.baseline.size})"
        )


def layer_sweep(
    model: Any,
    episodes: Sequence[AnyEpisode],
    vectors: Injectable,
    *,
    mode: Mode | None = None,
    scales: Sequence[float] = (1.0,),
    controls: bool | Mapping[str, Injectable] = False,
    position: Place = OWN,
    metrics: Iterable[str | Metric] = (),
    stop: str | None = None,
    max_tokens: int | None = None,
    progress: bool = False,
) -> LayerSweep:
    """Return scores with each episode's own task vector injected, at one layer at a time.

    Args:
        model: The model that the vectors come from.
        episodes: Usually zero-shot episodes, with other queries than the vectors were taken from.
        vectors: Task vectors, or anything else that can be injected; the sweep is over their
            layers.
        mode: As for :func:`inject`; the vectors' own by default.
        scales: Factors to multiply the vectors by, one sweep each.
        controls: Vectors to inject in the task vectors' place, from :func:`control_vectors`, at the
            first scale; True for those made from the vectors alone.
        position: As for :func:`inject`, or ``"own"``, where the vectors act by themselves: for
            task vectors -1, the last prompt token, which is by far the fastest.
        metrics: Further metrics, as for :func:`evaluate_many`.
        stop: As for :func:`evaluate`.
        max_tokens: As for :func:`evaluate`.
        progress: Whether to show a progress bar.

    Returns:
        The metrics by scale, layer and episode, and the baseline without intervention.

    Raises:
        ValueError: If a task has no vector, or the vectors come from another model.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, episodes))
        >>> new = tv.zero_shot(tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=1))
        >>> sweep = tv.layer_sweep(model, new, vectors, controls=True)
        >>> sweep.best_layer(), round(float(sweep.at(1).mean()), 1)
        (1, 1.0)
        >>> round(float(sweep.controls["random"].at(1).mean()), 1) < 0.5
        True
    """
    check_tasks(vectors, episodes)
    check_vectors(vectors, model, episodes)
    if isinstance(controls, bool):
        controls = control_vectors(vectors) if controls else {}
    sweeps = [(vectors, scale) for scale in scales]
    sweeps += [(control, scales[0]) for control in controls.values()]
    layers = tuple(vectors.layers)

    def variants_of(task: str) -> list[Variant]:
        injected = [
            swept.inject(task, layer, mode=mode, scale=scale, **at_place(position))
            for swept, scale in sweeps
            for layer in layers
        ]
        return [[], *injected]

    baseline, *scores = evaluate_many(
        model,
        episodes,
        variants_of,
        metrics=metrics,
        stop=stop,
        max_tokens=max_tokens,
        progress=progress,
    )
    grid = {
        name: rearrange(of, "(sweep layer) example -> sweep layer example", layer=len(layers))
        for name, of in stack(scores).items()
    }
    n = len(scales)

    def part(rows: slice, of: Sequence[float], others: Mapping[str, LayerSweep]) -> LayerSweep:
        own = {name: values[rows] for name, values in grid.items()}
        return LayerSweep(own, baseline, layers, tuple(float(scale) for scale in of), others)

    others = {
        kind: part(slice(n + index, n + index + 1), scales[:1], {})
        for index, kind in enumerate(controls)
    }
    return part(slice(n), scales, others)
