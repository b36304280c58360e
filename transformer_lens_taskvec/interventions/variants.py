"""Variants: interventions that are applied together, and in what order their branches run."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from transformer_lens_taskvec.interventions.intervention import Intervention, altered
from transformer_lens_taskvec.models.protocol import hook_name
from transformer_lens_taskvec.models.tokens import Each, PromptBatch, Separator, separators
from transformer_lens_taskvec.prompts import AnyEpisode


@dataclass(frozen=True, eq=False)
class PromptHook:
    """A hook that must know which prompts the rows of a batch are.

    ``evaluate`` and ``evaluate_many`` ask it for the hook function of each batch. Variants must
    then be a list, not a function of the task, so that rows are numbered through all episodes.

    Attributes:
        name: The full name of the hook point.
        of: Gives the hook function for a batch of prompts, whose answers may follow.
    """

    name: str
    of: Callable[[PromptBatch], Callable[..., Any]]

    def __iter__(self) -> Iterator[Any]:
        """Yield the hook name and the hook function, as ``fwd_hooks`` expects."""
        yield self.name
        yield self

    def __call__(self, activation: Any, hook: Any = None) -> Any:
        """Refuse to act without the prompts.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"the hook at {self.name} must know which prompts the rows are; give it to evaluate or "
            "evaluate_many, with episodes"
        )


Hook = Intervention | PromptHook | tuple[str, Callable[..., Any]]
"""An intervention, or any pair of a hook name and a hook function."""

Variant = Sequence[Hook]
"""Interventions applied together, in order; the empty variant is the unedited model."""

Variants = Sequence[Variant] | Callable[[str], Sequence[Variant]]
"""Variants for all episodes, or a function from a task to its variants, equally many per task."""


def acts_at_end(hook: Hook) -> bool:
    """Return whether a hook is an intervention that acts at the last prompt token only."""
    return isinstance(hook, Intervention) and hook.position in (-1, (-1,))


def tail(variants: Sequence[Variant], row: int) -> int | None:
    """Return how many of a prompt's last tokens hold all that the variants edit.

    It is None where a hook is no intervention, or acts at every position or at one counted from the
    beginning.

    Args:
        variants: The variants.
        row: The prompt's number.
    """
    needed = 1
    for variant in variants:
        for hook in variant:
            if not isinstance(hook, Intervention):
                return None
            position = hook.position
            if isinstance(position, Each):
                needed = max(needed, -position.from_end[row])
                continue
            places = (position,) if isinstance(position, int) else position
            if not isinstance(places, tuple) or max(places) >= 0:
                return None
            needed = max(needed, -min(places))
    return needed


def at_separators(
    model: Any, variants: Sequence[Variant], episodes: Sequence[AnyEpisode]
) -> Sequence[Variant]:
    """Return the variants with the places of separators in these episodes' prompts.

    Raises:
        ValueError: If an episode has no such separator, or as for :func:`separators`.
    """
    hooks = (hook for variant in variants for hook in variant)
    asked = {
        hook.position
        for hook in hooks
        if isinstance(hook, Intervention) and isinstance(hook.position, Separator)
    }
    if not asked:
        return variants
    if not episodes:
        raise ValueError("texts have no separators; give episodes")
    places, found = separators(model, episodes), {}
    for one in asked:
        for own in places:
            if not -len(own) <= one.index < len(own):
                raise ValueError(
                    f"{one!r} is outside a prompt of {len(own)} separators, those of its "
                    f"{len(own) - 1} demonstration(s) and of its query"
                )
        each = Each(tuple(own[one.index] for own in places))
        found[one] = -1 if set(each.from_end) == {-1} else each

    def moved(hook: Hook) -> Hook:
        if not isinstance(hook, Intervention) or not isinstance(hook.position, Separator):
            return hook
        return altered(hook, position=found[hook.position])

    return [[moved(hook) for hook in variant] for variant in variants]


def placed(hook: Hook, device: torch.device) -> Hook:
    """Return an intervention with its vector on a device."""
    if not isinstance(hook, Intervention) or hook.vector is None or hook.vector.device == device:
        return hook
    return altered(hook, vector=hook.vector.to(device))


@dataclass(frozen=True)
class Branching:
    """Variants that run as branches of one suffix.

    Attributes:
        unedited: The variants without an edit, which share the unedited branch.
        edited: The others, by the first layer that they edit.
        edits: The interventions of each of these.
        first: The first layer that each of these edits.
    """

    unedited: tuple[int, ...]
    edited: tuple[int, ...]
    edits: tuple[Variant, ...]
    first: tuple[int, ...]

    def active(self, start: int, end: int, n_layers: int) -> list[int]:
        """Return how many branches differ by each layer, of some edited ones and the unedited."""
        some = self.first[start:end]
        return [1 + bisect_right(some, layer) for layer in range(n_layers)]


def branching(
    model: Any, variants: Sequence[Variant], chosen: Sequence[int], *, shares_layers: bool
) -> Branching:
    """Return how some variants branch, all of which act at the last prompt token only.

    Args:
        model: Any model with TransformerLens' hook API.
        variants: The variants.
        chosen: The indices of those that branch.
        shares_layers: Whether blocks run on only those branches that differ by then.
    """
    moved = {index: variants[index] for index in chosen}
    if shares_layers:
        points = model.hook_dict  # made anew at every look
        n_layers = int(model.cfg.n_layers)
        moved = {index: _early(points, n_layers, variant) for index, variant in moved.items()}
    first = {index: _first(variant) for index, variant in moved.items() if variant}
    edited = tuple(sorted(first, key=first.__getitem__))
    return Branching(
        tuple(index for index in chosen if index not in first),
        edited,
        tuple(moved[index] for index in edited),
        tuple(first[index] for index in edited),
    )


def _early(points: Mapping[str, Any], n_layers: int, variant: Variant) -> Variant:
    """Return the variant with edits after a block moved before the next, to share the block.

    They stay ahead of the edits that are already there.
    """
    moved: list[Hook] = []
    rest: list[Hook] = []
    for hook in variant:
        assert isinstance(hook, Intervention)
        after = points[hook_name("resid_post", hook.layer)]
        if points[hook.name] is after and hook.layer + 1 < n_layers:
            moved.append(altered(hook, layer=hook.layer + 1, hook="resid_pre"))
        else:
            rest.append(hook)
    return [*moved, *rest]


def _first(variant: Variant) -> int:
    """Return the first layer that a variant edits."""
    return min(hook.layer for hook in variant if isinstance(hook, Intervention))


def grouped(
    variants: Variants, labels: Int[Tensor, " example"], tasks: Sequence[str]
) -> list[tuple[Int[Tensor, " row"], Sequence[Variant]]]:
    """Return the episodes that share variants, and these variants."""
    if callable(variants):
        groups = [
            (torch.where(labels == index)[0], _listed(variants(task)))
            for index, task in enumerate(tasks)
        ]
    else:
        groups = [(torch.arange(len(labels)), _listed(variants))]
    sizes = {len(some) for _, some in groups}
    if len(sizes) > 1:
        raise ValueError(f"variants gives {sorted(sizes)} variants; give each task the same number")
    if 0 in sizes:
        raise ValueError("variants is empty; [[]] is the model without interventions")
    return groups


def _listed(variants: Iterable[Iterable[Any]]) -> Sequence[Variant]:
    """Return variants that can be read more than once, such as those of generators."""
    return [list(variant) for variant in variants]


def alike_in_scores(
    rows: Sequence[int],
    episodes: Sequence[AnyEpisode],
    prompts: Sequence[Any],
    variants: Sequence[Variant],
) -> list[list[int]]:
    """Return the rows in lists whose episodes get the same scores, so that one of them will do.

    Every row stands alone if prompts are vectors, or if a function of the caller's may tell them
    apart.
    """
    known = all(
        isinstance(hook, Intervention) and isinstance(hook.mode, str)
        for variant in variants
        for hook in variant
    )
    if not known or isinstance(prompts[0], Tensor):
        return [[row] for row in rows]
    at = [
        hook.position
        for variant in variants
        for hook in variant
        if isinstance(hook, Intervention) and isinstance(hook.position, Separator)
    ]
    alike: dict[Any, list[int]] = {}
    for row in rows:
        places = getattr(episodes[row], "outputs_begin", ()) if at else ()
        key = (*prompts[row],), episodes[row].answer, episodes[row].template, places
        alike.setdefault(key, []).append(row)
    return list(alike.values())
