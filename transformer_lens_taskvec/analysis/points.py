"""The points whose task is decoded: what is left out, and what is too few to tell."""

from __future__ import annotations

import warnings

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_taskvec._utils.statistics import numbered
from transformer_lens_taskvec.activations import Activations
from transformer_lens_taskvec.analysis.classifiers import (
    WITH_NEIGHBOURS,
    Groups,
    Readout,
    readout_name,
)


def shared_sets(activations: Activations) -> Int[Tensor, " point"] | None:
    """Return the points' sets of demonstrations; None if no two points share one."""
    sets = activations.demo_sets
    return None if sets is None or len(sets.unique()) == len(sets) else sets


def check_left_out(groups: Int[Tensor, " point"], method: str | Readout, left_out: bool) -> None:
    """Raise ``ValueError`` unless points of one set shall be left out, and the method can."""
    if not left_out:
        raise ValueError(
            f"the {len(groups)} prompts share {len(groups.unique())} sets of demonstrations, and "
            "prompts of one set are each other's neighbours whatever the task. Use episodes with "
            "fresh demonstrations (demo_sets=None), or leave_out_sets=True"
        )
    if method not in WITH_NEIGHBOURS:
        raise ValueError(
            f"method {readout_name(method)!r} cannot leave out the prompts that share a point's "
            f"demonstrations; use one of {list(WITH_NEIGHBOURS)}, or fresh demonstrations"
        )


def n_others(labels: Int[Tensor, " point"], groups: Groups) -> int:
    """Return how many points can vote for each, at the least."""
    return len(labels) - (1 if groups is None else int(numbered(groups).bincount().max()))


def check_k(k: int, labels: Int[Tensor, " point"], groups: Groups) -> None:
    """Raise ``ValueError`` unless there are k points that can vote for each."""
    n_points, most = len(labels), n_others(labels, groups)
    if not 1 <= k <= most:
        raise ValueError(
            f"k is {k} and there are {n_points} points; k must be at least 1 and less than the "
            "number of points, since a point does not vote for itself"
            + ("" if groups is None else f", nor do those of its set: at most {most}")
        )


def majority_of(k: int) -> int:
    """Return how many of k votes are a majority."""
    return k // 2 + 1


def warn_of_small_tasks(activations: Activations, k: int) -> None:
    """Warn of tasks whose points cannot have a majority of their own task among k neighbours."""
    groups = shared_sets(activations)
    left_out = 0 if groups is None else len(activations) - n_others(activations.labels, groups) - 1
    majority = majority_of(k) + left_out
    sizes = torch.bincount(activations.labels, minlength=len(activations.tasks)).tolist()
    small = {task: n for task, n in zip(activations.tasks, sizes, strict=True) if n <= majority}
    if small:
        sizes_of_small = ", ".join(f"{task!r} has {n} point(s)" for task, n in small.items())
        warnings.warn(
            f"{sizes_of_small}, and a majority of k={k} neighbours takes {majority_of(k)} others "
            "of the same task, so its decodability is too low. Use a smaller k, or at least "
            f"{majority + 1} points per task.",
            stacklevel=3,
        )


def warn_of_unequal_tasks(activations: Activations) -> None:
    """Warn if some tasks have more than twice as many points as others."""
    sizes = torch.bincount(activations.labels, minlength=len(activations.tasks)).tolist()
    if max(sizes) > 2 * min(sizes):
        by_task = ", ".join(
            f"{n} of {task!r}" for task, n in zip(activations.tasks, sizes, strict=True)
        )
        warnings.warn(
            f"the numbers of points differ: {by_task}. Tasks with more points are decoded more "
            "often even where the activations tell nothing. Give each task as many points, or use "
            "method='centroid' or 'divergence'.",
            stacklevel=3,
        )


def warn_of_repeats(n_prompts: int, n_distinct: int) -> None:
    """Warn that the prompts of one query are not independent of each other."""
    warnings.warn(
        f"the {n_prompts} prompts have {n_distinct} distinct queries; p-values take prompts of one "
        "query to be independent, and are too small. Sample no more episodes than a task has "
        "inputs",
        stacklevel=3,
    )


def flat(points: Tensor) -> Float[Tensor, "point d"]:
    """Return each point as one float32 vector."""
    return rearrange(points.detach(), "point ... -> point (...)").float()
