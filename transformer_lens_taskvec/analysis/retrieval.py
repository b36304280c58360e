"""Retrieval: which points ask the same inputs, and what an order by chance would score.

Each point ranks the others by distance, and what counts is where the first one of its task stands.
All tasks are asked the same inputs, so that the input says nothing about the task, and what does
not depend on the task ranks the other tasks' points with the point's own input first: they are the
hard negatives.
"""

from __future__ import annotations

import warnings

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_taskvec._utils.statistics import numbered
from transformer_lens_taskvec.activations import Activations


def on_shared_inputs(activations: Activations) -> Activations:
    """Return the points whose inputs all tasks are asked, task by task, in one order of inputs.

    Raises:
        ValueError: If the inputs are not known, or tasks share fewer than two.

    Warns:
        UserWarning: If some points are left out.
    """
    if activations.inputs is None:
        raise ValueError(
            "retrieval compares tasks on the same inputs, and activations.inputs is None; collect "
            "them from episodes of text"
        )
    n_tasks, inputs = len(activations.tasks), numbered(activations.inputs)
    asked = torch.zeros(int(inputs.max()) + 1, n_tasks, dtype=torch.bool)
    asked[inputs, activations.labels] = True
    shared = asked.all(dim=1)
    if int(shared.sum()) < 2:
        raise ValueError(
            f"retrieval compares tasks on the same inputs, and the {n_tasks} tasks share "
            f"{int(shared.sum())} of {len(asked)}; it needs two or more. Sample the episodes from "
            "tasks.with_same_inputs(tasks)"
        )
    rows = torch.where(shared[inputs])[0]
    if len(rows) < len(activations):
        warnings.warn(
            f"{len(activations) - len(rows)} of {len(activations)} points are left out, since not "
            f"all tasks are asked their inputs; {int(shared.sum())} inputs are shared. "
            "tasks.with_same_inputs(tasks) gives tasks that share all of them.",
            stacklevel=3,
        )
    place = activations.labels[rows] * len(asked) + inputs[rows]
    return activations.select(rows[place.argsort(stable=True)])


def by_chance(
    labels: Int[Tensor, " point"], inputs: Int[Tensor, " point"], *, recall: bool
) -> float:
    """Return the expected reciprocal rank, or recall at 1, of random orders; a mean over tasks."""
    own = (labels == rearrange(labels, "point -> point 1")).sum(dim=1)
    places = numbered(inputs) * (int(labels.max()) + 1) + labels
    right = own - places.bincount()[places]
    expected = _expected(right, len(labels) - own, recall=recall)
    return float(torch.stack([expected[labels == one].mean() for one in labels.unique()]).mean())


def _expected(
    right: Int[Tensor, " point"], wrong: Int[Tensor, " point"], *, recall: bool
) -> Float[Tensor, " point"]:
    """Return the mean of one over the first right rank, among right and wrong in random order."""
    ranks = torch.arange(1, 2 if recall else int(wrong.max()) + 2, dtype=torch.float64)
    right, wrong = (rearrange(n.double(), "point -> point 1") for n in (right, wrong))
    before = torch.arange(len(ranks), dtype=torch.float64)
    left = right + wrong - before
    # All ranks before have a wrong one with this probability.
    none = ((wrong - before) / left).clamp(min=0).cumprod(dim=1).roll(1, dims=1)
    none[:, 0] = 1.0
    return (none * right / left / ranks).where(left > 0, 0.0).sum(dim=1)
