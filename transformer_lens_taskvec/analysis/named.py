"""Variants of the zero-shot model by name, next to the same queries with demonstrations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from transformer_lens_taskvec.controls import FROM_VECTORS, control_vectors
from transformer_lens_taskvec.interventions.checks import check_variants
from transformer_lens_taskvec.interventions.variants import Variant
from transformer_lens_taskvec.prompts import Episode
from transformer_lens_taskvec.vectors.base import Injectable, check_tasks, check_vectors

ZERO_SHOT, TASK_VECTOR = "zero-shot", "task vector"
"""The queries as they are, and with the vectors of their own tasks."""

NamedVariants = Mapping[str, Variant | Callable[[str], Variant]]
"""By name, the interventions for all episodes, or a function from a task to its interventions."""


def named_variants(
    model: Any,
    zero: Sequence[Episode],
    variants: NamedVariants,
    vectors: Injectable | None,
    layers: Sequence[int | None] | None,
    controls: bool | Mapping[str, Injectable],
    seed: int,
) -> dict[tuple[str, int | None], Callable[[str], Variant]]:
    """Return each variant as a function of the task, by name and layer; the zero-shot one first.

    Args:
        model: The model.
        zero: Zero-shot episodes.
        variants: Variants of the caller's.
        vectors: Vectors that are injected at each of their layers, or None.
        layers: Some of these layers; all by default.
        controls: Vectors in their place; True for those made from the vectors alone.
        seed: Seed of these.

    Raises:
        ValueError: If two variants have one name, there are layers without vectors, or something
            does not fit the model.
    """
    if vectors is None and layers is not None:
        raise ValueError(f"layers is {list(layers)}, but there are no vectors; give vectors=")
    found: dict[tuple[str, int | None], Callable[[str], Variant]] = {(ZERO_SHOT, None): _nothing}
    given: dict[str, Injectable] = {}
    if vectors is not None:
        check_tasks(vectors, zero)
        check_vectors(vectors, model, zero)
        kinds = FROM_VECTORS if len(vectors.tasks) > 1 else ("random",)
        if isinstance(controls, bool):
            controls = control_vectors(vectors, kinds=kinds, seed=seed) if controls else {}
        given = {TASK_VECTOR: vectors, **controls}
    for name in (*variants, *given):
        taken = [*(known for known, _ in found), *(given if name in variants else ())]
        if name in taken:
            raise ValueError(
                f"two variants are called {name!r}; give the one of yours another name"
            )
        if name in variants:
            found[name, None] = _of_task(variants[name])
            continue
        for layer in given[name].layers if layers is None else layers:
            found[name, layer] = _injecting(given[name], layer)
    for task in dict.fromkeys(episode.task for episode in zero):
        check_variants(model, [list(of(task)) for of in found.values()])
    return found


def _nothing(task: str) -> Variant:
    return []


def _of_task(variant: Variant | Callable[[str], Variant]) -> Callable[[str], Variant]:
    if callable(variant):
        return variant
    kept = list(variant)
    return lambda task: kept


def _injecting(vectors: Injectable, layer: int | None) -> Callable[[str], Variant]:
    return lambda task: vectors.inject(task, layer)


def check_few_shot(episodes: Sequence[Episode]) -> None:
    """Raise ``ValueError`` unless there are episodes with demonstrations and answers of tokens."""
    if not episodes:
        raise ValueError("few_shot is empty; give at least one few-shot episode")
    if isinstance(episodes[0].prompt, Tensor):
        raise ValueError("these episodes' answers are numbers, which have no distribution")
    for episode in episodes:
        if not episode.n_shots:
            raise ValueError(
                f"an episode of {episode.task!r} has no demonstrations; give few-shot episodes, "
                "whose queries are asked zero-shot as well"
            )


def check_choice(argument: str, value: str, known: Sequence[str]) -> None:
    """Raise ``ValueError`` unless the value is known."""
    if value not in known:
        raise ValueError(f"{argument} is {value!r}; there are: {', '.join(dict.fromkeys(known))}")
