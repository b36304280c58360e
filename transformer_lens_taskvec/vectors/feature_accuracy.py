"""How many features of a dictionary it takes to do a task: accuracy with some kept or dropped.

After Lim et al. (2025), who keep or drop the features of a class of images and measure zero-shot
accuracy; here the features are those of an injected task vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec.interventions.modes import Mode
from transformer_lens_taskvec.interventions.variants import Variant
from transformer_lens_taskvec.prompts import AnyEpisode
from transformer_lens_taskvec.scoring import (
    Scores,
    evaluate_many,
    intervals_by_task,
    mean_by_task,
    stack,
)
from transformer_lens_taskvec.vectors.base import (
    OWN,
    Place,
    TaskVectors,
    at_place,
    check_tasks,
    check_vectors,
)
from transformer_lens_taskvec.vectors.sparse import VECTOR, Decomposition, ranks_of


@dataclass(frozen=True, repr=False)
class FeatureAccuracy(Shown):
    """Scores with some of the task vectors' features injected.

    Attributes:
        conditions: What was injected, and the number of features: ``("vector", None)``,
            ``("reconstruction", None)``, ``("keep", k)``, ``("drop", k)``, ``("keep random", k)``.
        metrics: By name ``[condition, example]``: ``correct``, ``loss``, and those asked for.
        baseline: The same episodes with nothing injected.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.find_tasks(["XOR", "OR"]), 8, 4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, episodes, layers=[1]))
        >>> tokens = tv.vectors.residuals(model, episodes, 1)
        >>> dictionary = tv.vectors.train_dictionary(tokens, n_features=16, k=4, steps=5)
        >>> parts = tv.vectors.decompose(vectors, dictionary, 1)
        >>> found = tv.vectors.accuracy_by_features(model, tv.zero_shot(episodes), parts, ks=(1,))
        >>> found.conditions[0]
        ('vector', None)
    """

    conditions: tuple[tuple[str, int | None], ...]
    metrics: Mapping[str, Shaped[Tensor, "condition example"]]
    baseline: Scores

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names."""
        return self.baseline.tasks

    def scores(self, condition: str, k: int | None = None) -> Scores:
        """Return the scores under one condition.

        Raises:
            ValueError: If it was not measured.
        """
        if (condition, k) not in self.conditions:
            raise ValueError(f"no condition {(condition, k)}; there are: {list(self.conditions)}")
        at = self.conditions.index((condition, k))
        return replace(
            self.baseline, metrics={name: values[at] for name, values in self.metrics.items()}
        )

    def to_frame(self) -> pd.DataFrame:
        """Return one row per condition and task, the baseline first.

        The columns are ``condition, k, task, accuracy, low, high, loss, n, n_distinct``: Wilson's
        95 % interval of the accuracy, and the numbers of episodes and distinct queries.
        """
        metrics = {
            name: torch.cat([self.baseline.metrics[name][None], self.metrics[name]])
            for name in ("correct", "loss")
        }
        accuracy, loss = (mean_by_task(metrics[name], self.baseline) for name in metrics)
        ends = intervals_by_task(metrics["correct"], self.baseline, shares=True)
        rows = []
        for at, (condition, k) in enumerate([("baseline", None), *self.conditions]):
            for index, task in enumerate(self.tasks):
                own = self.baseline.of(task)
                rows.append({
                    "condition": condition,
                    "k": k,
                    "task": task,
                    "accuracy": float(accuracy[at, index]),
                    "low": float(ends[at, index, 0]),
                    "high": float(ends[at, index, 1]),
                    "loss": float(loss[at, index]),
                    "n": len(own),
                    "n_distinct": own.n_distinct,
                })  # fmt: skip
        return pd.DataFrame(rows).astype({"k": "Int64"})

    def __repr__(self) -> str:
        numbers = ", ".join(
            f"{condition}{'' if k is None else f' {k}'} {self.scores(condition, k).accuracy:.2f}"
            for condition, k in self.conditions
        )
        before = f"baseline {self.baseline.accuracy:.2f}"
        return f"FeatureAccuracy({before}, {numbers}; {self.baseline.size})"


def accuracy_by_features(
    model: Any,
    episodes: Sequence[AnyEpisode],
    decomposition: Decomposition,
    *,
    ks: Sequence[int] = (1, 2, 5, 10, 20, 50, 100),
    of: str = VECTOR,
    mode: Mode | None = None,
    position: Place = OWN,
    stop: str | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> FeatureAccuracy:
    """Return scores with the top features of each task kept, or dropped, for several numbers.

    Next to them are the vector itself, its whole reconstruction, and as a control as many of its
    active features at random. All share one pass over the prompts.

    Args:
        model: The model that the vectors come from.
        episodes: Usually zero-shot episodes, with other queries than the vectors were taken from.
        decomposition: The features of the task vectors.
        ks: The numbers of features.
        of: As for :meth:`Decomposition.features_of`.
        mode: As for :func:`inject`; the vectors' own by default.
        position: As for :func:`layer_sweep`.
        stop: As for :func:`evaluate`.
        max_tokens: As for :func:`evaluate`.
        seed: Seed of the random features.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If a number is negative or given twice, a task has no vector, or the vectors
            come from another model.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> from transformer_lens_taskvec.vectors.all_tokens import residuals
        >>> from transformer_lens_taskvec.vectors.dictionary import train_dictionary
        >>> from transformer_lens_taskvec.vectors.sparse import decompose
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 20, 4, seed=0)
        >>> tokens = residuals(model, episodes, 1, 2000)
        >>> dictionary = train_dictionary(tokens, n_features=256, k=16, steps=150, batch_size=256)
        >>> found = decompose(tv.task_vectors(tv.collect(model, episodes)), dictionary, 1)
        >>> new = tv.zero_shot(tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=1))
        >>> by_k = accuracy_by_features(model, new, found, ks=(1, 4, 16))
        >>> by_k.scores("keep", 16).accuracy > by_k.scores("drop", 16).accuracy
        True
    """
    if len(set(ks)) < len(ks) or any(k < 0 for k in ks):
        raise ValueError(f"ks is {list(ks)}; give different numbers of at least 0")
    vectors, own = decomposition.vectors, decomposition.features_of(of)
    check_tasks(vectors, episodes)
    check_vectors(vectors, model, episodes)
    ranks = {"keep": ranks_of(own), "keep random": _random_ranks(own, seed)}
    injected: dict[tuple[str, int | None], TaskVectors] = {
        ("vector", None): vectors,
        ("reconstruction", None): decomposition.reconstruct(own),
    }
    for k in ks:
        injected["keep", k] = decomposition.reconstruct(own * (ranks["keep"] < k))
        injected["drop", k] = decomposition.reconstruct(own * (ranks["keep"] >= k))
        injected["keep random", k] = decomposition.reconstruct(own * (ranks["keep random"] < k))

    def variants_of(task: str) -> list[Variant]:
        place = at_place(position)
        layer = decomposition.layer
        edits = [one.inject(task, layer, mode=mode, **place) for one in injected.values()]
        return [[], *edits]

    baseline, *scores = evaluate_many(
        model, episodes, variants_of, stop=stop, max_tokens=max_tokens, progress=progress
    )
    return FeatureAccuracy(tuple(injected), stack(scores), baseline)


def _random_ranks(
    features: Float[Tensor, "task feature"], seed: int
) -> Int[Tensor, "task feature"]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(features.shape, generator=generator).masked_fill(features <= 0, -torch.inf)
    return order.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
