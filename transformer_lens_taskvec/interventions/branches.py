"""Branches of a packed pass: which run together, and the hooks that edit their tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from transformer_lens_taskvec.interventions.intervention import Intervention
from transformer_lens_taskvec.models.tokens import Position

BRANCH_TOKENS = 256
"""The most suffix tokens per prompt: attention among them grows with their square."""

_FEW = 4
"""Up to this number of variants, large batches save more than answers of one length."""

_AT_ONCE = ("replace", "add", "zero")
"""The modes in which many branches are edited by one operation."""


@dataclass(frozen=True)
class Suffix:
    """A pass over branches of some prompts.

    Attributes:
        rows: The prompts' indices in their batch.
        start: The first of the edited variants that run.
        end: The end of these variants.
    """

    rows: tuple[int, ...]
    start: int
    end: int


def suffixes(
    lengths: Sequence[int], n_edited: int, n_variants: int, *, budget: int, most: int | None
) -> list[Suffix]:
    """Return the passes over the branches of a batch of prompts.

    With many variants, prompts with answers of one length run together; otherwise every variant
    would run the padding of shorter answers.

    Args:
        lengths: The number of tokens of each prompt's answer.
        n_edited: The number of variants that edit something.
        n_variants: The number of all variants.
        budget: The most tokens of a pass.
        most: The most tokens of one prompt's branches, None for no limit.
    """
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        groups.setdefault(0 if n_variants <= _FEW else length, []).append(row)
    found: list[Suffix] = []
    for _, group in sorted(groups.items()):
        length = max(lengths[row] for row in group)
        tokens = min(one for one in (BRANCH_TOKENS, budget, most) if one is not None)
        branches = max(1, tokens // length - 1)
        size = max(1, budget // ((1 + min(branches, n_edited)) * length))
        for first in range(0, len(group), size):
            rows = tuple(group[first : first + size])
            found.extend(
                Suffix(rows, start, min(start + branches, n_edited))
                for start in range(0, max(n_edited, 1), branches)
            )
    return found


Columns = Callable[[Position], Int[Tensor, "row at"]]
"""Returns the columns of positions of the prompts within a branch."""


def branch_hooks(
    model: Any, variants: Sequence[Sequence[Any]], length: int, columns: Columns | None = None
) -> list[tuple[str, Callable[..., Any]]]:
    """Return one hook function per edited hook point, which edits each branch.

    Several names of one hook point count as one, so that a variant's edits keep their order.

    Args:
        model: Any model with TransformerLens' hook API.
        variants: The interventions of each branch, in order.
        length: The number of tokens of a branch.
        columns: Where in a branch the positions are; by default all are its first token.
    """
    points = model.hook_dict
    edits: dict[int, list[tuple[int, Intervention]]] = {}
    for index, variant in enumerate(variants):
        for hook in variant:
            assert isinstance(hook, Intervention)
            edits.setdefault(id(points[hook.name]), []).append((index * length, hook))
    return [(of_point[0][1].name, _in_branches(of_point, columns)) for of_point in edits.values()]


def _in_branches(
    edits: Sequence[tuple[int, Intervention]], columns: Columns | None
) -> Callable[..., Tensor]:
    if columns is None:
        rounds = [_at_once(some) for some in _rounds(edits)]
    else:
        rounds = [_at_columns(edit, start + columns(edit.position)) for start, edit in edits]

    def hook_function(activation: Tensor, hook: Any = None) -> Tensor:
        edited = activation.clone()
        for edit in rounds:
            edit(edited)
        return edited

    return hook_function


def _at_columns(
    intervention: Intervention, columns: Int[Tensor, "row at"]
) -> Callable[[Tensor], None]:
    """Return a function that edits some columns of each row, in place."""

    def edit(activation: Tensor) -> None:
        rows = torch.arange(len(columns), device=activation.device)
        places = columns.to(activation.device).unbind(dim=1)
        edited = [intervention.edit(activation[rows, at]) for at in places]
        for at, new in zip(places, edited, strict=True):
            activation[rows, at] = new

    return edit


def _rounds(edits: Sequence[tuple[int, Intervention]]) -> list[list[tuple[int, Intervention]]]:
    """Return the edits in groups that can be made at once, each after those it depends on."""
    found: list[list[tuple[int, Intervention]]] = []
    place: dict[Any, int] = {}
    for column, edit in edits:
        key = _kind(edit)
        at = place.get(key)
        if at is None or any(column == other for some in found[at:] for other, _ in some):
            place[key] = len(found)
            found.append([(column, edit)])
        else:
            found[at].append((column, edit))
    return found


def _kind(edit: Intervention) -> Any:
    """Return what edits that are made at once have in common; nothing else is equal to others."""
    if edit.mode not in _AT_ONCE or edit.relative:
        return object()  # variants may share one intervention
    vector = edit.vector
    return edit.mode, edit.head is None, None if vector is None else (vector.dtype, vector.shape)


def _at_once(edits: Sequence[tuple[int, Intervention]]) -> Callable[[Tensor], None]:
    """Return a function that makes edits of one kind in an activation's columns, in place."""
    column, first = edits[0]
    if len(edits) == 1:

        def edit_one(activation: Tensor) -> None:
            activation[:, column] = first.edit(activation[:, column])

        return edit_one
    vectors = [edit.vector * edit.scale for _, edit in edits if edit.vector is not None]
    new = torch.stack(vectors) if vectors else torch.zeros(())
    columns = torch.tensor([column for column, _ in edits], device=new.device)
    where: tuple[Any, ...] = (slice(None), columns)
    if first.head is not None:
        where = (*where, torch.tensor([edit.head for _, edit in edits], device=new.device))

    def edit_all(activation: Tensor) -> None:
        written = new.to(activation)
        activation[where] = activation[where] + written if first.mode == "add" else written

    return edit_all
