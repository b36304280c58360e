"""How task decodability depends on the number of neighbours, of points, and on the method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import torch
from einops import rearrange

from transformer_lens_taskvec.activations import Activations
from transformer_lens_taskvec.analysis.classifiers import WITH_NEIGHBOURS, Readout, readout_name
from transformer_lens_taskvec.analysis.decodability import task_decodability
from transformer_lens_taskvec.analysis.points import majority_of


def decodability_sensitivity(
    activations: Activations,
    *,
    ks: Sequence[int] = (1, 3, 5, 10, 20),
    ns: Sequence[int] | None = None,
    methods: Sequence[str | Readout] = ("knn", "centroid", "cosine"),
    layer: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Return mean TD for several numbers of neighbours, numbers of points, and methods.

    Args:
        activations: As for :func:`task_decodability`.
        ks: Numbers of neighbours, for the methods that have neighbours.
        ns: Points per task, drawn without replacement; by default a quarter, a half and all.
        methods: As for :func:`task_decodability`.
        layer: The layer; by default the best for ``"knn"``.
        seed: Seed of the draws.

    Returns:
        One row per method, k and n: ``method, k, n, layer, td, chance``. Left out is every k of
        which n points cannot have a majority.

    Raises:
        ValueError: As for :func:`task_decodability`, or if a task has fewer points than asked for.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> activations = tv.collect(model, episodes)
        >>> frame = tv.analysis.decodability_sensitivity(activations, ks=(3, 5), ns=(10,), layer=1)
        >>> list(zip(frame.method, frame.td.round(1)))
        [('knn', 1.0), ('knn', 1.0), ('centroid', 1.0), ('cosine', 1.0), ('cosine', 1.0)]
    """
    layer = task_decodability(activations).best_layer() if layer is None else layer
    smallest = int(torch.bincount(activations.labels).min())
    ns = ns or sorted({max(2, smallest // 4), max(2, smallest // 2), smallest})
    rows = []
    for n in ns:
        if not 1 < n <= smallest:
            raise ValueError(f"n is {n}; it must be between 2 and {smallest}, the smallest task's")
        some = _drawn(activations, layer, n, seed)
        for method in methods:
            has_k = method in WITH_NEIGHBOURS
            for k in ks if has_k else ks[:1]:
                if has_k and n <= majority_of(k):
                    continue
                found = task_decodability(some, k, method=method)
                rows.append(
                    {
                        "method": readout_name(method),
                        "k": k if has_k else None,
                        "n": n,
                        "layer": layer,
                        "td": float(found.mean[0]),
                        "chance": found.chance,
                    }
                )
    return pd.DataFrame(rows)


def _drawn(activations: Activations, layer: int, n: int, seed: int) -> Activations:
    """Return one layer of n points per task."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(activations), generator=generator)
    rows = torch.cat(
        [order[activations.labels[order] == task][:n] for task in range(len(activations.tasks))]
    )
    values = rearrange(activations.at(layer)[rows], "point ... -> point 1 ...")
    queries = None if activations.queries is None else activations.queries[rows]
    labels = activations.labels[rows]
    sets = None if activations.demo_sets is None else activations.demo_sets[rows]
    return replace(
        activations, values=values, labels=labels, layers=(layer,), queries=queries, demo_sets=sets
    )
