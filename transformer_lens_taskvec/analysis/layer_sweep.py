"""Layer sweeps: each task's own vector injected at one layer at a time.

All layers, scales and controls are variants of the same pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec._utils.statistics import cross_fitted_best, wilson_interval
from transformer_lens_taskvec.activations import layer_index
from transformer_lens_taskvec.controls import control_vectors
from transformer_lens_taskvec.interventions.intervention import inject
from transformer_lens_taskvec.interventions.modes import Mode
from transformer_lens_taskvec.interventions.packed import Variant
from transformer_lens_taskvec.prompts import AnyEpisode
from transformer_lens_taskvec.scoring import Scores, evaluate_by_task
from transformer_lens_taskvec.vectors.base import TaskVectors


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

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, episodes))
        >>> sweep = tv.layer_sweep(model, tv.zero_shot(episodes), vectors)
        >>> sweep.accuracy.shape, sweep.best_layer("XOR")
        (torch.Size([4, 6]), 1)
        >>> sweep.at(1)["XOR"]
        1.0
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
        mode: As for :func:`inject`.
        scales: What the vectors are multiplied with, one sweep each.
        controls: Vectors to inject in the task vectors' place, from
            :func:`control_vectors`; True for those that are made of the
            vectors alone. They are at the first scale.
        position: Where to inject; -1, the last prompt token, is by far the fastest.
        stop: As for :func:`evaluate`.
        max_tokens: As for :func:`evaluate`.
        progress: Whether to show a progress bar.

    Returns:
        Accuracy and NLL by layer and task, with those without intervention.

    Raises:
        ValueError: If a task has no vector, or the vectors are another model's.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, episodes))
        >>> new = tv.zero_shot(tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=1))
        >>> sweep = tv.layer_sweep(model, new, vectors, controls=True)
        >>> sweep.best_layer(), round(float(sweep.accuracy[1].mean()), 1)
        (1, 1.0)
        >>> round(float(sweep.controls["random"].accuracy[1].mean()), 1) < 0.5
        True
    """
    vectors.check_model(model)
    if isinstance(controls, bool):
        controls = control_vectors(vectors) if controls else {}
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

    vectors.check_tasks([episode.task for episode in episodes])
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
