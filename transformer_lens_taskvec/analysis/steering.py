"""Accuracy under the right task's vector and under Null's (Han et al. 2025, Figure 20)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from transformer_lens_taskvec._utils.metrics import Metric
from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec.interventions.modes import Mode
from transformer_lens_taskvec.interventions.variants import Variant
from transformer_lens_taskvec.prompts import AnyEpisode
from transformer_lens_taskvec.scoring import Scores, evaluate_many
from transformer_lens_taskvec.tasks.base import NULL
from transformer_lens_taskvec.vectors.base import Injectable, check_tasks, check_vectors


@dataclass(frozen=True, repr=False)
class SteeringEffect(Shown):
    """Scores unperturbed, with the right task's vector, and with Null's (the paper's Figure 20).

    Attributes:
        unperturbed: Nothing injected.
        positive: The right task's vector injected.
        negative: The Null task's vector injected.
        layer: The layer of the injection.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> study = tv.paper.run_study(tv.load_model("toy"), tv.bitwise_tasks(), shots=(1, 4), n=12)
        >>> study.steering[1].positive.accuracy > study.steering[1].negative.accuracy
        True
    """

    unperturbed: Scores
    positive: Scores
    negative: Scores
    layer: int | None

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names."""
        return self.unperturbed.tasks

    def to_frame(self) -> pd.DataFrame:
        """Return one row per task: ``task, unperturbed, positive, negative, n, n_distinct``.

        Each accuracy is followed by ``..._low`` and ``..._high``, Wilson's 95 % interval, and
        ``..._NAME`` for each metric asked for.
        """
        rows = []
        for task in self.tasks:
            row: dict[str, Any] = {"task": task}
            for kind in ("unperturbed", "positive", "negative"):
                scores: Scores = getattr(self, kind).of(task)
                row[kind] = scores.accuracy
                row[f"{kind}_low"], row[f"{kind}_high"] = scores.interval()
                row |= {f"{kind}_{name}": scores.mean(name) for name in scores.extra}
                row["n"], row["n_distinct"] = len(scores), scores.n_distinct
            rows.append(row)
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        lines = [
            f"{row.task} {row.negative:.2f} < {row.unperturbed:.2f} > {row.positive:.2f}"
            for row in self.to_frame().itertuples()
        ]
        return f"SteeringEffect(layer {self.layer}; negative, none, positive: {'; '.join(lines)})"


def steering_effect(
    model: Any,
    episodes: Sequence[AnyEpisode],
    vectors: Injectable,
    layer: int | None,
    null: str = NULL,
    *,
    mode: Mode | None = None,
    scale: float = 1.0,
    metrics: Iterable[str | Metric] = (),
    stop: str | None = None,
    max_tokens: int | None = None,
) -> SteeringEffect:
    """Return scores unperturbed, with the right task's vector, and with Null's.

    Args:
        model: The model that the vectors come from.
        episodes: Episodes of tasks that have vectors.
        vectors: Task vectors, or anything else that can be injected, including Null's.
        layer: The layer, counted from 0.
        null: The task whose vector carries no task.
        mode: As for :func:`inject`; the vectors' own by default.
        scale: As for :func:`inject`.
        metrics: Further metrics, as for :func:`evaluate_many`.
        stop: As for :func:`evaluate`.
        max_tokens: As for :func:`evaluate`.

    Raises:
        ValueError: If a task or ``null`` has no vector, or there is no such layer.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> four_shot = tv.sample_episodes(tv.bitwise_tasks(), 10, 4, seed=0)
        >>> one_shot = tv.sample_episodes(tv.bitwise_tasks(), 10, 1, seed=1)
        >>> vectors = tv.task_vectors(tv.collect(model, four_shot))
        >>> frame = tv.steering_effect(model, one_shot, vectors, layer=1).to_frame()
        >>> bool((frame.positive >= frame.negative)[frame.task != "Null"].all())
        True
    """
    check_tasks(vectors, episodes)
    check_vectors(vectors, model, episodes)
    variants_of = steering_variants(vectors, layer, null, mode=mode, scale=scale)
    unperturbed, positive, negative = evaluate_many(
        model, episodes, variants_of, metrics=metrics, stop=stop, max_tokens=max_tokens
    )
    return SteeringEffect(unperturbed, positive, negative, layer)


def steering_variants(
    vectors: Injectable,
    layer: int | None,
    null: str,
    *,
    mode: Mode | None = None,
    scale: float = 1.0,
) -> Callable[[str], list[Variant]]:
    """Return a function of the task: no intervention, its own vector, and Null's vector.

    Raises:
        ValueError: If ``null`` has no vector.
    """
    if null not in vectors.tasks:
        raise ValueError(f"no vector for {null}; there are vectors for: {', '.join(vectors.tasks)}")

    def variants_of(task: str) -> list[Variant]:
        injected = [vectors.inject(name, layer, mode=mode, scale=scale) for name in (task, null)]
        return [[], *injected]

    return variants_of
