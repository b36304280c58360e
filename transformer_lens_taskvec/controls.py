"""Controls: vectors that should not do what a task vector does.

An accuracy under injection is evidence for a task vector only beside what other vectors of the same
size, from the same model and prompts, do in its place. They are task vectors like any other, so
they go into every function that takes vectors, at the price of a few more variants.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from transformer_lens_taskvec.activations import collect
from transformer_lens_taskvec.prompts import AnyEpisode, Episode, shuffle_labels, zero_shot
from transformer_lens_taskvec.vectors.base import TaskVectors
from transformer_lens_taskvec.vectors.means import task_vectors

FROM_VECTORS = ("random", "other task", "mean")
"""Controls that are made of the vectors alone."""

FROM_PROMPTS = ("shuffled labels", "zero-shot", "reinitialised")
"""Controls that need the prompts, and passes over them."""


def control_vectors(
    vectors: TaskVectors,
    model: Any = None,
    episodes: Sequence[Episode] | None = None,
    *,
    kinds: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, TaskVectors]:
    """Vectors to hold task vectors against.

    - ``random``: a random direction, as long as the task's vector;
    - ``other task``: the vector of the task before it, of the last one for the first;
    - ``mean``: the mean over all tasks;
    - ``shuffled labels``: the mean over the same prompts with each one's answers shuffled;
    - ``zero-shot``: the mean over the same queries without demonstrations;
    - ``reinitialised``: the mean over the same prompts in a model whose weights are shuffled within
      each matrix, as long as the task's vector.

    Args:
        vectors: The task vectors.
        model: The model they come from; needed for the last three kinds.
        episodes: The episodes they are the means of; needed for the last three kinds.
        kinds: Which controls; by default all that can be made of what is given: labels are shuffled
            among two demonstrations or more.
        seed: Seed of directions, shuffles and weights.

    Returns:
        Vectors of the same tasks and layers, by kind.

    Raises:
        ValueError: If a kind is unknown or needs a model and episodes that are not given, there is
            one task only for ``other task`` or ``mean``, a task of the vectors has no episodes, or
            an episode has too few demonstrations for ``shuffled labels``.

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
        >>> all(control.at(1)["XOR"] < sweep.at(1)["XOR"] for control in sweep.controls.values())
        True
    """
    known = (*FROM_VECTORS, *FROM_PROMPTS)
    given = model is not None and episodes is not None
    if kinds is None:
        kinds = [*FROM_VECTORS, *(_possible(episodes) if given and episodes else ())]
    for kind in kinds:
        if kind not in known:
            raise ValueError(f"no control {kind!r}; there are {', '.join(known)}")
        if kind in FROM_PROMPTS and not given:
            raise ValueError(f"the control {kind!r} needs model= and episodes=")
    if len(vectors.tasks) < 2 and {"other task", "mean"} & set(kinds):
        raise ValueError("with one task only there is no other task, and the mean is its own")
    return {kind: _control(kind, vectors, model, list(episodes or ()), seed) for kind in kinds}


def _possible(episodes: Sequence[Episode]) -> list[str]:
    """The controls from prompts that these prompts allow: labels to shuffle, shots to leave out."""
    fewest = min(episode.n_shots for episode in episodes)
    return [kind for kind, needed in zip(FROM_PROMPTS, (2, 1, 0), strict=True) if fewest >= needed]


def _control(
    kind: str, vectors: TaskVectors, model: Any, episodes: list[Episode], seed: int
) -> TaskVectors:
    values = vectors.values
    if kind == "random":
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(values.shape, generator=generator)
        return replace(vectors, values=_as_long_as(drawn, values))
    if kind == "other task":
        return replace(vectors, values=values.roll(1, dims=0))
    if kind == "mean":
        return replace(vectors, values=values.mean(dim=0, keepdim=True).expand_as(values).clone())
    if kind == "shuffled labels":
        return _taken_from(model, shuffle_labels(episodes, seed), vectors)
    if kind == "zero-shot":
        return _taken_from(model, zero_shot(episodes), vectors)
    found = _taken_from(_with_shuffled_weights(model, seed), episodes, vectors)
    return replace(vectors, values=_as_long_as(found.values, values))


def _taken_from(model: Any, episodes: Sequence[AnyEpisode], like: TaskVectors) -> TaskVectors:
    source = like.source
    found = task_vectors(
        collect(
            model,
            episodes,
            hook=source.hook,
            layers=like.layers,
            position=source.position,
            prepend_bos=source.prepend_bos,
        )
    )
    missing = [task for task in like.tasks if task not in found.tasks]
    if missing:
        raise ValueError(f"no episodes of {', '.join(missing)}, which there are vectors of")
    order = [found.tasks.index(task) for task in like.tasks]
    return replace(like, values=found.values[order])


def _as_long_as(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    unit: torch.Tensor = values / values.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    scaled: torch.Tensor = unit * like.norm(dim=-1, keepdim=True)
    return scaled


def _with_shuffled_weights(model: Any, seed: int) -> Any:
    """A copy of the model with the entries of every weight matrix shuffled."""
    shuffled = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in shuffled.parameters():
            if parameter.ndim > 1:
                order = torch.randperm(parameter.numel(), generator=generator)
                flat = parameter.flatten()[order.to(parameter.device)]
                parameter.copy_(flat.view_as(parameter))
    return shuffled
