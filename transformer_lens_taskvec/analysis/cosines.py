"""How alike task vectors are: cosines of tasks with tasks, and of layers with layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from transformer_lens_taskvec._utils.frames import grid_frame
from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec.activations import Source, layer_index
from transformer_lens_taskvec.controls import ControlVectors
from transformer_lens_taskvec.vectors.base import TaskVectors

_NOTHING = 1e-6
"""A vector shorter than this share of its length before centring is rounding."""


@dataclass(frozen=True, repr=False)
class Similarity(Shown):
    """Cosines between task vectors; NaN where a vector is zero, or nothing is left of it.

    Attributes:
        by_layer: ``[layer, task, task]``, tasks with tasks at each layer. With ``other``, the rows
            are the vectors' tasks and the columns those of the other ones.
        by_task: ``[task, layer, layer]``, layers with layers for each task, likewise.
        own: ``[layer, task, task]``, as ``by_layer`` without ``other``; tasks are ordered by it.
        norms: ``[task, layer]``, lengths before centring.
        other_norms: ``[task, layer]``, those of the other vectors, or the same.
        tasks: The tasks' names.
        layers: The layers, counted from 0.
        centred: Whether the vectors are minus their mean over tasks.
        crossed: Whether the columns are other vectors.
        source: Where the vectors come from.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> found = similarity(tv.task_vectors(tv.collect(model, episodes)))
        >>> found.at(1).shape, found.of("XOR").shape
        (torch.Size([6, 6]), torch.Size([4, 4]))
    """

    by_layer: Float[Tensor, "layer task other_task"]
    by_task: Float[Tensor, "task layer other_layer"]
    own: Float[Tensor, "layer task task"]
    norms: Float[Tensor, "task layer"]
    other_norms: Float[Tensor, "task layer"]
    tasks: tuple[str, ...]
    layers: tuple[int, ...]
    centred: bool
    crossed: bool
    source: Source

    def at(self, layer: int) -> Float[Tensor, "task other_task"]:
        """Return the cosines of tasks with tasks at one layer.

        Raises:
            ValueError: If there is no such layer.
        """
        return self.by_layer[layer_index(self.layers, layer)]

    def of(self, task: str) -> Float[Tensor, "layer other_layer"]:
        """Return the cosines of layers with layers for one task.

        Raises:
            ValueError: If there is no such task.
        """
        if task not in self.tasks:
            raise ValueError(f"no vectors of task {task!r}; there are: {', '.join(self.tasks)}")
        return self.by_task[self.tasks.index(task)]

    def order(self, layer: int) -> tuple[str, ...]:
        """Return the tasks in hierarchical order at one layer: like ones next to each other.

        Clusters are merged by their mean distance, one minus the cosine, and the tree's branches
        are turned so that neighbours are as near as they can be (scipy's ``optimal_ordering``).

        Raises:
            ValueError: If there is no such layer.
        """
        from scipy.cluster.hierarchy import leaves_list, linkage
        from scipy.spatial.distance import squareform

        cosines = self.own[layer_index(self.layers, layer)].nan_to_num(0.0).double()
        if len(self.tasks) < 3:
            return self.tasks
        distances = (1 - cosines).clamp(min=0).fill_diagonal_(0)
        near = squareform(distances.numpy(), checks=False)
        tree = linkage(near, method="average", optimal_ordering=True)
        return tuple(self.tasks[index] for index in leaves_list(tree))

    def to_frame(self) -> pd.DataFrame:
        """Return ``task, other_task, layer, other_layer, cosine``: both kinds of cosine, in turn.

        First one row per layer and two tasks, then one per task and two layers.
        """
        axes = {"layer": self.layers, "task": self.tasks, "other_task": self.tasks}
        tasks = grid_frame(axes, {"cosine": self.by_layer})
        tasks["other_layer"] = tasks.layer
        axes = {"task": self.tasks, "layer": self.layers, "other_layer": self.layers}
        layers = grid_frame(axes, {"cosine": self.by_task})
        layers["other_task"] = layers.task
        columns = ["task", "other_task", "layer", "other_layer", "cosine"]
        return pd.concat([tasks[columns], layers[columns]], ignore_index=True)

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values, None for NaN."""
        tensors = ("by_layer", "by_task", "norms", "other_norms")
        return {
            "model": self.source.model,
            "hook": self.source.hook,
            "tasks": list(self.tasks),
            "layers": list(self.layers),
            "centred": self.centred,
            "crossed": self.crossed,
            "order": {layer: list(self.order(layer)) for layer in self.layers},
            **{name: _plain(getattr(self, name).tolist()) for name in tensors},
        }

    def __repr__(self) -> str:
        n = len(self.tasks)
        what = "vectors with others" if self.crossed else "vectors"
        how = ", minus the mean over tasks" if self.centred else ""
        if self.crossed:
            known = self.by_layer.diagonal(dim1=1, dim2=2)
            mean = f"mean cosine of a task with itself {float(known.nanmean()):.2f}"
        else:
            apart = ~torch.eye(n, dtype=torch.bool)
            mean = f"mean cosine of two tasks {float(self.by_layer[:, apart].nanmean()):.2f}"
        return f"Similarity({what} of {n} tasks at {len(self.layers)} layers{how}: {mean})"


def similarity(
    vectors: TaskVectors | ControlVectors,
    other: TaskVectors | ControlVectors | None = None,
    *,
    centred: bool = True,
) -> Similarity:
    """Return cosines of task vectors with each other, or with other vectors of the same tasks.

    States of all tasks at a layer have most of their length in common, so that their cosines are
    near one; what sets tasks apart is what is left without the mean. Centred cosines of ``n`` tasks
    are -1 / (n - 1) on average where the tasks have nothing to do with each other.

    Args:
        vectors: Task vectors; those of several heads are taken together.
        other: Vectors to compare with: a control, those of another method or of another checkpoint.
        centred: Take away, at each layer, the mean over tasks, from each of the two its own.

    Raises:
        ValueError: If ``other`` has not all tasks and layers, comes from another model or has other
            widths, ``centred`` is asked of fewer than three tasks, or either has no values.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 20, 4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, episodes))
        >>> random = tv.control_vectors(vectors, kinds=["random"])["random"]
        >>> own, control = similarity(vectors), similarity(vectors, random)
        >>> bool(own.at(1).diagonal().min() > 0.99), bool(control.at(1).abs().max() < 0.5)
        (True, True)
    """
    tasks, layers = vectors.tasks, _layers(vectors)
    if centred and len(tasks) < 3:
        raise ValueError(
            f"centred is True for {len(tasks)} task(s); two vectors minus their mean are opposite "
            "whatever they are. Give three tasks or more, or centred=False"
        )
    if other is not None:
        _check_comparable(vectors, other)
    values = _values(vectors, tasks, layers)
    own, norms = _unit(values, centred), values.norm(dim=-1)
    theirs, other_norms = own, norms
    if other is not None:
        other_values = _values(other, tasks, layers)
        if other_values.shape != values.shape:
            raise ValueError(
                f"other has vectors of width {other_values.shape[-1]}, and these have width "
                f"{values.shape[-1]}; give vectors of one hook point"
            )
        theirs, other_norms = _unit(other_values, centred), other_values.norm(dim=-1)
    tasks_with_tasks = "row layer d, column layer d -> layer row column"
    return Similarity(
        by_layer=_cosines(own, theirs, tasks_with_tasks),
        by_task=_cosines(own, theirs, "task row d, task column d -> task row column"),
        own=_cosines(own, own, tasks_with_tasks),
        norms=norms.float(),
        other_norms=other_norms.float(),
        tasks=tasks,
        layers=layers,
        centred=centred,
        crossed=other is not None,
        source=vectors.source,
    )


def _layers(vectors: TaskVectors | ControlVectors) -> tuple[int, ...]:
    known = [layer for layer in vectors.layers if layer is not None]
    if len(known) < len(vectors.layers) or not hasattr(vectors, "values"):
        raise ValueError(f"{vectors!r} has no vector per task and layer; give TaskVectors")
    return tuple(known)


def _check_comparable(
    vectors: TaskVectors | ControlVectors, other: TaskVectors | ControlVectors
) -> None:
    missing = [
        *(task for task in vectors.tasks if task not in other.tasks),
        *(layer for layer in vectors.layers if layer not in _layers(other)),
    ]
    if missing:
        raise ValueError(
            f"other has no vectors of {', '.join(map(str, missing))}; give vectors of the same "
            "tasks and layers"
        )
    here, there = vectors.source.model, other.source.model
    if here != there:
        raise ValueError(
            f"other comes from {there!r}, and these vectors from {here!r}; directions in two "
            "models cannot be compared"
        )


def _values(
    vectors: TaskVectors | ControlVectors, tasks: Sequence[str], layers: Sequence[int]
) -> Float[Tensor, "task layer d"]:
    rows = [vectors.tasks.index(task) for task in tasks]
    columns = [layer_index(vectors.layers, layer) for layer in layers]
    return rearrange(
        vectors.values[rows][:, columns].double(), "task layer ... -> task layer (...)"
    )


def _unit(values: Float[Tensor, "task layer d"], centred: bool) -> Float[Tensor, "task layer d"]:
    """Return the vectors at length one; NaN where nothing is left."""
    left = values - reduce(values, "task layer d -> 1 layer d", "mean") if centred else values
    length = left.norm(dim=-1, keepdim=True)
    known = length > _NOTHING * values.norm(dim=-1, keepdim=True)
    return torch.where(known, left / length, torch.nan)


def _cosines(
    a: Float[Tensor, "task layer d"], b: Float[Tensor, "task layer d"], pattern: str
) -> Float[Tensor, "one row column"]:
    return einsum(a, b, pattern).float()


def _plain(values: Any) -> Any:
    if isinstance(values, list):
        return [_plain(value) for value in values]
    return None if values != values else values
