"""The effect of each task's vector on the episodes of each task (Han et al. 2025, Figure 7)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from transformer_lens_taskvec._utils.frames import grid_frame
from transformer_lens_taskvec._utils.metrics import Metric
from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec.interventions.modes import Mode
from transformer_lens_taskvec.interventions.variants import Variant
from transformer_lens_taskvec.prompts import AnyEpisode
from transformer_lens_taskvec.scoring import (
    LOSS_LABELS,
    Scores,
    evaluate_many,
    intervals_by_task,
    mean_by_task,
    stack,
)
from transformer_lens_taskvec.vectors.base import OWN, Injectable, Place, at_place, check_vectors


@dataclass(frozen=True, repr=False)
class PerturbationMatrix(Shown):
    """The effect of each task's vector on the episodes of each task (the paper's Figure 7).

    Attributes:
        deltas: For each metric ``[source, target]``, its mean change in the source task's episodes
            when the target task's vector is injected: ``correct``, ``loss``, and those asked for.
        loss_interval: ``[source, target, 2]``, the 95 % interval of ``delta_loss`` over queries,
            Student's with a correction for skewness; NaN of a single query.
        sources: The tasks of the episodes.
        targets: The tasks of the vectors.
        layer: The layer of the injection.
        baseline: The episodes without intervention.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, episodes))
        >>> matrix = tv.perturbation_matrix(model, episodes, vectors, layer=1)
        >>> matrix.conditional_decoding > 5  # nats: the answers depend on the right vector
        True
    """

    deltas: Mapping[str, Float[Tensor, "source target"]]
    loss_interval: Float[Tensor, "source target 2"]
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    layer: int | None
    baseline: Scores

    @property
    def delta_loss(self) -> Float[Tensor, "source target"]:
        """``[source, target]``, the change in mean loss, of the kind ``baseline.loss_kind``."""
        return self.deltas["loss"]

    @property
    def delta_accuracy(self) -> Float[Tensor, "source target"]:
        """``[source, target]``, the change in accuracy."""
        return self.deltas["correct"]

    @property
    def conditional_decoding(self) -> float:
        """The mean change in loss off the diagonal minus the mean on it.

        It measures how far the answers depend on the vector being the right one.
        """
        own = torch.tensor([[s == t for t in self.targets] for s in self.sources])
        return float(self.delta_loss[~own].mean() - self.delta_loss[own].mean())

    def to_frame(self) -> pd.DataFrame:
        """Return one row per source and target: ``source, target, delta_loss, low, high`` ...

        ``low`` and ``high`` are ``loss_interval``. Then ``delta_accuracy``, ``delta_NAME`` for each
        metric asked for, and the numbers of episodes and of distinct queries, ``n`` and
        ``n_distinct``.
        """
        own = [self.baseline.of(task) for task in self.sources]
        columns = {
            "delta_loss": self.delta_loss,
            "low": self.loss_interval[..., 0],
            "high": self.loss_interval[..., 1],
            "delta_accuracy": self.delta_accuracy,
            **{f"delta_{name}": self.deltas[name] for name in self.baseline.extra},
            "n": torch.tensor([[len(one)] for one in own]),
            "n_distinct": torch.tensor([[one.n_distinct] for one in own]),
        }
        return grid_frame({"source": self.sources, "target": self.targets}, columns)

    def __repr__(self) -> str:
        return (
            f"PerturbationMatrix(layer {self.layer}, {len(self.sources)} sources x "
            f"{len(self.targets)} targets; conditional decoding "
            f"{self.conditional_decoding:.3f} of {LOSS_LABELS[self.baseline.loss_kind]})"
        )


def perturbation_matrix(
    model: Any,
    episodes: Sequence[AnyEpisode],
    vectors: Injectable,
    layer: int | None,
    *,
    mode: Mode | None = None,
    scale: float = 1.0,
    position: Place = OWN,
    metrics: Iterable[str | Metric] = (),
    stop: str | None = None,
    max_tokens: int | None = None,
) -> PerturbationMatrix:
    """Return the effect of every task's vector on every task (Han et al. 2025, Figure 7).

    Args:
        model: The model that the vectors come from.
        episodes: Usually few-shot episodes.
        vectors: Task vectors, or anything else that can be injected; their tasks are the columns.
        layer: The layer, counted from 0.
        mode: As for :func:`inject`; the vectors' own by default.
        scale: As for :func:`inject`.
        position: As for :func:`layer_sweep`.
        metrics: Further metrics, as for :func:`evaluate_many`.
        stop: As for :func:`evaluate`.
        max_tokens: As for :func:`evaluate`.

    Raises:
        ValueError: If there is no such layer, or the vectors come from another model.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, episodes))
        >>> matrix = tv.perturbation_matrix(model, episodes, vectors, layer=1)
        >>> row, column = matrix.sources.index("AND"), matrix.targets.index("NAND")
        >>> bool(matrix.delta_loss[row, column] > 1)
        True
        >>> round(float(matrix.delta_accuracy[row, row]), 1)
        0.0
    """
    check_vectors(vectors, model, episodes)
    edits: dict[str, Variant] = {
        task: vectors.inject(task, layer, mode=mode, scale=scale, **at_place(position))
        for task in vectors.tasks
    }
    return matrix_of_edits(
        model, episodes, edits, layer, metrics=metrics, stop=stop, max_tokens=max_tokens
    )


def matrix_of_edits(
    model: Any,
    episodes: Sequence[AnyEpisode],
    edits: Mapping[str, Variant],
    layer: int | None,
    **options: Any,
) -> PerturbationMatrix:
    """Return a perturbation matrix of any edits, one column each.

    Args:
        model: Any model with TransformerLens' hook API.
        episodes: The episodes; their tasks are the rows.
        edits: The interventions of each target, by its name.
        layer: The layer they act on, to be recorded in the result.
        **options: As for :func:`evaluate_many`.
    """
    before, *after = evaluate_many(model, episodes, [[], *edits.values()], **options)
    changes = {
        name: values.double() - before.metrics[name].double()
        for name, values in stack(after).items()
    }
    return PerturbationMatrix(
        {
            name: rearrange(mean_by_task(values, before), "target source -> source target")
            for name, values in changes.items()
        },
        rearrange(
            intervals_by_task(changes["loss"], before), "target source end -> source target end"
        ),
        before.tasks,
        tuple(edits),
        layer,
        before,
    )
