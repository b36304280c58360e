"""Linear maps: a task vector that depends on the query (Kwon et al. 2026).

What demonstrations change at the last prompt token may differ between queries. A map predicts it
from the state without demonstrations::

    h_few - h_zero  ~  d + W (h_zero - m)

with ``d`` the mean change and ``m`` the mean state without demonstrations. ``W`` is fitted by ridge
regression over queries, whose answers are not needed. With ``W = 0`` this is the contrast vector,
so the two are nested: what the map adds shows whether a constant vector is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isinf
from typing import Any

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from transformer_lens_taskvec.activations import Source, layer_index
from transformer_lens_taskvec.interventions.intervention import Intervention
from transformer_lens_taskvec.interventions.modes import AddMapped, Mode
from transformer_lens_taskvec.models.tokens import Separator
from transformer_lens_taskvec.prompts import Episode
from transformer_lens_taskvec.vectors.base import TaskVectors, warn_of_shared
from transformer_lens_taskvec.vectors.contrast import few_and_zero
from transformer_lens_taskvec.vectors.means import task_means

_ROUNDING = 1e-10
"""States whose variance is a smaller share of their squared length are taken to be constant."""


@dataclass(frozen=True, repr=False)
class LinearMaps:
    """An affine map per task and layer, which changes an activation by what it predicts from it.

    The constant part is the vector of the interventions, so controls replace it and keep the rest:
    what they show is what the task's mean change does next to its map. For a control of the whole,
    fit maps to shuffled labels: ``control_vectors(..., extract=linear_maps)``.

    Attributes:
        change: The mean change ``d`` of each task and layer: the contrast vectors.
        maps: ``W`` and ``m`` of each task, by layer, as modes; ``W`` in factors of low rank.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.find_tasks(["XOR", "OR"]), 10, 4, seed=0)
        >>> found = linear_maps(model, episodes)
        >>> found
        LinearMaps(2 tasks x 4 layers x 64, rank 10, resid_post of toy@1500: XOR, OR)
        >>> found.matrix("XOR", 1).shape
        torch.Size([64, 64])
    """

    change: TaskVectors
    maps: tuple[tuple[AddMapped, ...], ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names."""
        return self.change.tasks

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers, counted from 0."""
        return self.change.layers

    @property
    def source(self) -> Source:
        """Where the states come from."""
        return self.change.source

    def at(self, task: str, layer: int | None) -> AddMapped:
        """Return the map of one task at one layer, as a mode for :func:`inject`.

        Raises:
            KeyError: If there is no such task.
            ValueError: If there is no such layer.
        """
        if task not in self.tasks:
            raise KeyError(f"no map for task {task!r}; there are: {', '.join(self.tasks)}")
        return self.maps[self.tasks.index(task)][layer_index(self.layers, layer)]

    def matrix(self, task: str, layer: int) -> Float[Tensor, "d d"]:
        """Return ``W``, whose rows are outputs, of one task at one layer.

        Raises:
            KeyError: If there is no such task.
            ValueError: If there is no such layer.
        """
        of = self.at(task, layer)
        return of.writes.T @ of.reads

    def inject(
        self,
        task: str,
        layer: int | None,
        *,
        mode: Mode | None = None,
        scale: float = 1.0,
        relative: bool = False,
        position: int | Sequence[int] | Separator | None = -1,
    ) -> list[Intervention]:
        """Return the intervention that adds what the map predicts, times ``scale``.

        Raises:
            KeyError: If there is no such task.
            ValueError: If there is no such layer, a mode or a relative strength is given, or as
                for :func:`inject`.
        """
        if mode is not None:
            raise ValueError(
                f"mode is {mode!r}, and a map has one way to act: leave mode out, or inject its "
                "constant part, maps.change"
            )
        if relative:
            raise ValueError(
                "relative is True, and what a map adds depends on the activation; leave it out, or "
                "inject the map's constant part, maps.change"
            )
        of = self.at(task, layer)
        scaled = of if scale == 1 else replace(of, writes=scale * of.writes)
        return self.change.inject(task, layer, mode=scaled, scale=scale, position=position)

    def __repr__(self) -> str:
        rank = max(of.reads.shape[0] for own in self.maps for of in own)
        width = self.change.values.shape[-1]
        return (
            f"LinearMaps({len(self.tasks)} tasks x {len(self.layers)} layers x {width}, rank "
            f"{rank}, {self.source.hook} of {self.source.model}: {', '.join(self.tasks)})"
        )


def linear_maps(
    model: Any,
    episodes: Sequence[Episode],
    *,
    ridge: float = 1.0,
    hook: str = "resid_post",
    layers: Sequence[int] | None = None,
    progress: bool = False,
) -> LinearMaps:
    """Return maps from the state without demonstrations to what demonstrations change.

    Ridge regression with an intercept, per task and layer, over the episodes' queries (Kwon et al.
    2026). There are fewer queries than dimensions, so it is solved between queries, and ``W`` has
    at most their number as its rank.

    Args:
        model: Any model with TransformerLens' hook API.
        episodes: Few-shot episodes with other queries than those that the maps will be tested on.
        ridge: The penalty of ``|W|^2``, in units of the mean squared distance of the states without
            demonstrations from their mean, so that it means the same at every layer; ``inf`` for
            ``W = 0``.
        hook: The hook point within a block, as TransformerLens names it.
        layers: The layers, counted from 0; None for all.
        progress: Whether to show a progress bar.

    Returns:
        The maps.

    Raises:
        ValueError: If ``ridge`` is not above 0, an activation is NaN or infinite, or as for
            :func:`collect`.

    Warns:
        UserWarning: If episodes share their demonstrations.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> sizes = {"train": 20, "test": 10}
        >>> sets = tv.sample_splits(tv.find_tasks(["XOR", "OR"]), sizes, n_shots=4, seed=0)
        >>> found = linear_maps(model, sets["train"])
        >>> found.inject("XOR", 1)
        [Intervention(blocks.1.hook_resid_post, f, |v|=4.63, position=-1)]
        >>> sweep = tv.layer_sweep(model, tv.zero_shot(sets["test"]), found)
        >>> bool((sweep.at(1) > sweep.baseline_accuracy).all())
        True
    """
    if not ridge > 0:
        raise ValueError(f"ridge is {ridge}; it must be above 0, inf for no map")
    few, zero = few_and_zero(model, episodes, hook=hook, layers=layers, progress=progress)
    warn_of_shared(few)
    maps = []
    for index in range(len(few.tasks)):
        own = few.labels == index
        states = zero.values[own].double()
        changes = few.values[own].double() - states
        maps.append(
            tuple(
                _fitted(states[:, layer], changes[:, layer], ridge)
                for layer in range(len(few.layers))
            )
        )
    source = replace(few.source, mode="add")
    change = TaskVectors(task_means(few) - task_means(zero), few.tasks, few.layers, source)
    return LinearMaps(change, tuple(maps))


def _fitted(
    states: Float[Tensor, "query d"], changes: Float[Tensor, "query d"], ridge: float
) -> AddMapped:
    """Return the map of one task and layer by ridge regression, solved between queries."""
    mean = reduce(states, "query d -> d", "mean")
    reads = states - mean
    centred = changes - reduce(changes, "query d -> d", "mean")
    if isinf(ridge):
        return AddMapped(mean.float(), reads[:0].float(), reads[:0].float())
    spread, size = (of.square().sum(dim=1).mean() for of in (reads, states))
    penalty = ridge * max(float(spread), _ROUNDING * float(size))
    gram = reads @ reads.T + (penalty or 1.0) * torch.eye(len(reads))
    writes = torch.linalg.solve(gram, centred)
    return AddMapped(mean.float(), reads.float(), writes.float())
