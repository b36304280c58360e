"""Controls: vectors that should not do what a task vector does.

An accuracy under injection is evidence for a task vector only next to the accuracy under other
vectors of the same size, from the same model and prompts. A control is injected like any task
vector, so every function that takes vectors takes controls.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Float
from torch import Tensor

from transformer_lens_taskvec.activations import Source, collect, layer_index
from transformer_lens_taskvec.interventions.intervention import Intervention
from transformer_lens_taskvec.interventions.modes import Mode
from transformer_lens_taskvec.models.tokens import known_bos_habit, note_bos_habit
from transformer_lens_taskvec.prompts import Episode, shuffle_labels, zero_shot
from transformer_lens_taskvec.vectors.base import OWN, Injectable, Place, at_place
from transformer_lens_taskvec.vectors.means import task_vectors

FROM_VECTORS = ("random", "other task", "mean")
"""Controls made from the vectors alone."""

FROM_PROMPTS: Mapping[str, int] = {"shuffled labels": 2, "zero-shot": 1, "reinitialised": 0}
"""Controls that need passes over the prompts, and how many demonstrations each needs."""

_SHUFFLED = 8
"""Prompts per task that the control in a model of shuffled weights takes: its direction is chance,
and its length the task vector's."""

Extract = Callable[[Any, Sequence[Any]], Injectable]
"""Makes vectors from a model and episodes."""


@dataclass(frozen=True, repr=False)
class ControlVectors:
    """Vectors that take the place of others, with the same interventions.

    Attributes:
        vectors: The vectors they are controls for.
        values: ``[task, layer, d]``, or ``[task, layer, part, d]`` where injecting the task takes
            several interventions; zero past those of a layer that takes fewer than others.
    """

    vectors: Injectable
    values: Float[Tensor, "task layer ..."]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names."""
        return self.vectors.tasks

    @property
    def layers(self) -> Sequence[int | None]:
        """The layers they can be injected at."""
        return self.vectors.layers

    @property
    def source(self) -> Source:
        """The source of ``vectors``."""
        return self.vectors.source

    def __getitem__(self, task: str) -> Float[Tensor, "layer *part d"]:
        """Return the control's vectors for one task."""
        return self.values[self.tasks.index(task)]

    def inject(
        self,
        task: str,
        layer: int | None,
        *,
        mode: Mode | None = None,
        scale: float = 1.0,
        relative: bool = False,
        position: Place = OWN,
    ) -> list[Intervention]:
        """Return the task's interventions with the control's vectors; as for ``Injectable``."""
        options = at_place(position)
        found = self.vectors.inject(task, layer, mode=mode, scale=scale, **options)
        own = rearrange(self[task][layer_index(self.layers, layer)], "... d -> (...) d")
        return [
            replace(one, vector=vector, relative=relative or one.relative)
            for one, vector in zip(found, own[: len(found)], strict=True)
        ]


def control_vectors(
    vectors: Injectable,
    model: Any = None,
    episodes: Sequence[Episode] | None = None,
    *,
    kinds: Sequence[str] | None = None,
    extract: Extract | None = None,
    seed: int = 0,
) -> dict[str, Injectable]:
    """Return vectors to compare task vectors with.

    - ``random``: a random direction with the norm of the task's vector;
    - ``other task``: the vector of the previous task in the list, of the last task for the first;
    - ``mean``: the mean over all tasks;
    - ``shuffled labels``: the mean over the same prompts with the answers of each prompt shuffled;
    - ``zero-shot``: the mean over the same queries without demonstrations;
    - ``reinitialised``: the mean over up to eight of each task's prompts in a model whose weights
      are shuffled within each matrix, rescaled to the norm of the task's vector.

    Args:
        vectors: Task vectors, or anything else that can be injected.
        model: The model they come from; needed for the last three kinds.
        episodes: The episodes they were made from; needed for the last three kinds.
        kinds: Which controls; by default all that the arguments allow: shuffled labels take prompts
            of two demonstrations or more.
        extract: ``(model, episodes) -> vectors``, how ``vectors`` were made, for the last three
            kinds; by default the mean activation of each task, :func:`task_vectors`.
        seed: Seed of directions, shuffles and weights.

    Returns:
        Vectors of the same tasks and layers, by kind, each an :class:`Injectable`.

    Raises:
        ValueError: If a kind is unknown or needs a model and episodes that are not given, ``other
            task`` or ``mean`` is asked for with one task, a task has no episodes, an episode has
            too few demonstrations for ``shuffled labels``, an intervention of ``vectors`` has no
            vector, or function vectors come without ``extract``.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> sizes = {"train": 10, "test": 10}
        >>> sets = tv.sample_splits(tv.bitwise_tasks(null=False), sizes, n_shots=4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, sets["train"]))
        >>> made = tv.control_vectors(vectors, model, sets["train"])
        >>> list(made)
        ['random', 'other task', 'mean', 'shuffled labels', 'zero-shot', 'reinitialised']
        >>> sweep = tv.layer_sweep(model, tv.zero_shot(sets["test"]), vectors, controls=made)
        >>> all((control.at(1) < sweep.at(1)).all() for control in sweep.controls.values())
        True
    """
    known = (*FROM_VECTORS, *FROM_PROMPTS)
    given = model is not None and episodes is not None
    if kinds is None:
        fewest = min((episode.n_shots for episode in episodes or ()), default=-1) if given else -1
        kinds = [*FROM_VECTORS, *(kind for kind, n in FROM_PROMPTS.items() if fewest >= n)]
    for kind in kinds:
        if kind not in known:
            raise ValueError(f"no control {kind!r}; there are: {', '.join(known)}")
        if kind in FROM_PROMPTS and not given:
            raise ValueError(f"the control {kind!r} needs model= and episodes=")
    if len(vectors.tasks) < 2 and {"other task", "mean"} & set(kinds):
        raise ValueError(
            "with one task only there is no other task and no mean to compare with; leave out "
            "'other task' and 'mean', or give vectors of more tasks"
        )
    extract = extract or _means_like(vectors)
    return {
        kind: _control(kind, vectors, model, list(episodes or ()), extract, seed) for kind in kinds
    }


def _control(
    kind: str,
    vectors: Injectable,
    model: Any,
    episodes: list[Episode],
    extract: Extract,
    seed: int,
) -> Injectable:
    missing = set(vectors.tasks) - {episode.task for episode in episodes}
    if missing and kind in FROM_PROMPTS:
        raise ValueError(
            f"no episodes of {', '.join(sorted(missing))}, which vectors has; add some"
        )
    if kind == "shuffled labels":
        return extract(model, shuffle_labels(episodes, seed))
    if kind == "zero-shot":
        return extract(model, zero_shot(episodes))
    values = _values(vectors, vectors)
    if kind == "random":
        generator = torch.Generator().manual_seed(seed)
        values = _as_long_as(torch.randn(values.shape, generator=generator), values)
    elif kind == "other task":
        values = values.roll(1, dims=0)
    elif kind == "mean":
        mean = reduce(values, "task ... -> ...", "mean")
        values = repeat(mean, "... -> task ...", task=len(values))
    else:
        found = extract(_with_shuffled_weights(model, seed), _first(episodes, _SHUFFLED))
        values = _as_long_as(_values(found, vectors), values)
    return ControlVectors(vectors, values)


def _first(episodes: Sequence[Episode], n: int) -> list[Episode]:
    """Return the first ``n`` episodes of each task."""
    counts: Counter[str] = Counter()
    found = []
    for episode in episodes:
        counts[episode.task] += 1
        if counts[episode.task] <= n:
            found.append(episode)
    return found


def _values(vectors: Injectable, like: Injectable) -> Float[Tensor, "task layer *part d"]:
    """Return the vectors injected for each task and layer of ``like``."""
    rows = []
    for task in like.tasks:
        for layer in like.layers:
            parts = [one.vector for one in vectors.inject(task, layer)]
            known = [part for part in parts if part is not None]
            if len(known) < len(parts):
                raise ValueError(
                    f"an intervention for {task} at layer {layer} has no vector, so there is no "
                    "control of the same size; give vectors whose interventions all have one"
                )
            rows.append(torch.stack(known))
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    values = rearrange(padded, "(task layer) part d -> task layer part d", task=len(like.tasks))
    return values[:, :, 0] if values.shape[2] == 1 else values


def _means_like(vectors: Injectable) -> Extract:
    """Return a function that extracts means at the hook, layers and position of the vectors."""
    source = vectors.source

    def extract(model: Any, episodes: Sequence[Any]) -> Injectable:
        if source.heads:
            raise ValueError(
                "these are function vectors; say how they are made, for example "
                "extract=lambda model, episodes: function_vectors(model, episodes)"
            )
        layers = [layer for layer in vectors.layers if layer is not None]
        return task_vectors(
            collect(model, episodes, hook=source.hook, layers=layers, position=source.position)
        )

    return extract


def _as_long_as(
    values: Float[Tensor, "*many d"], like: Float[Tensor, "*many d"]
) -> Float[Tensor, "*many d"]:
    unit: Tensor = torch.nn.functional.normalize(values, dim=-1, eps=1e-12)
    scaled: Tensor = unit * like.norm(dim=-1, keepdim=True)
    return scaled


def _with_shuffled_weights(model: Any, seed: int) -> Any:
    """Return a copy of the model with the entries of every weight matrix shuffled."""
    shuffled = copy.deepcopy(model)
    known = known_bos_habit(getattr(model, "tokenizer", None))
    note_bos_habit(getattr(shuffled, "tokenizer", None), known)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in shuffled.parameters():
            if parameter.ndim > 1:
                order = torch.randperm(parameter.numel(), generator=generator)
                flat = rearrange(parameter, "... -> (...)")[order.to(parameter.device)]
                parameter.copy_(flat.view_as(parameter))
    return shuffled
