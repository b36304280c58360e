"""What the right task's vector and the Null vector do to accuracy (Han et al. 2025, Figure 20)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec.interventions.intervention import inject
from transformer_lens_taskvec.interventions.modes import Mode
from transformer_lens_taskvec.interventions.packed import Variant
from transformer_lens_taskvec.prompts import AnyEpisode
from transformer_lens_taskvec.scoring import Scores, evaluate_by_task
from transformer_lens_taskvec.vectors.base import TaskVectors


@dataclass(frozen=True, repr=False)
class SteeringEffect(Shown):
    """Accuracy unperturbed, with the right task's vector, and with Null's (the paper's Figure 20).

    Attributes:
        unperturbed: ``[example]`` scores of the model as it is.
        positive: The right task's vector injected.
        negative: The Null task's vector injected.
        layer: The layer of the injection.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> four_shot = tv.sample_episodes(tv.bitwise_tasks(), 10, 4, seed=0)
        >>> one_shot = tv.sample_episodes(tv.bitwise_tasks(), 10, 1, seed=1)
        >>> vectors = tv.task_vectors(tv.collect(model, four_shot))
        >>> effect = tv.steering_effect(model, one_shot, vectors, layer=1)
        >>> effect.positive.of("XOR").accuracy > effect.negative.of("XOR").accuracy
        True
    """

    unperturbed: Scores
    positive: Scores
    negative: Scores
    layer: int

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names."""
        return self.unperturbed.tasks

    def to_frame(self) -> pd.DataFrame:
        """One row a task: ``task, unperturbed, positive, negative, n``.

        Beside each accuracy stand ``..._low`` and ``..._high``, Wilson's 95 % interval.
        """
        rows = []
        for task in self.tasks:
            row: dict[str, Any] = {"task": task}
            for kind in ("unperturbed", "positive", "negative"):
                scores: Scores = getattr(self, kind).of(task)
                row[kind] = scores.accuracy
                row[f"{kind}_low"], row[f"{kind}_high"] = scores.interval()
                row["n"] = len(scores)
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
    vectors: TaskVectors,
    layer: int,
    null: str = "Null",
    *,
    mode: Mode = "replace",
    scale: float = 1.0,
    stop: str | None = None,
    max_tokens: int | None = None,
) -> SteeringEffect:
    """Accuracy unperturbed, with the right task's mean, and with Null's (the paper's Figure 20).

    Args:
        model: The model that the vectors come from.
        episodes: Episodes of tasks that have vectors.
        vectors: The vectors, Null's among them.
        layer: The layer, counted from 0.
        null: The name of the task whose vector carries no task.
        mode: As for :func:`inject`.
        scale: As for :func:`inject`.
        stop: As for :func:`evaluate`.
        max_tokens: As for :func:`evaluate`.

    Returns:
        The three scores of every episode.

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
    vectors.check_model(model)
    vectors.check_tasks([*(episode.task for episode in episodes), null])
    variants_of = steering_variants(vectors, layer, null, mode=mode, scale=scale)
    unperturbed, positive, negative = evaluate_by_task(
        model,
        episodes,
        lambda task: [[], *variants_of(task)],
        stop=stop,
        prepend_bos=vectors.source.prepend_bos,
        max_tokens=max_tokens,
    )
    return SteeringEffect(unperturbed, positive, negative, layer)


def steering_variants(
    vectors: TaskVectors, layer: int, null: str, *, mode: Mode = "replace", scale: float = 1.0
) -> Callable[[str], list[Variant]]:
    """For each task the positive and the negative intervention: its own vector, and Null's."""
    hook = vectors.source.hook

    def variants_of(task: str) -> list[Variant]:
        return [
            [inject(vectors.at(name, layer), layer, mode=mode, scale=scale, hook=hook)]
            for name in (task, null)
        ]

    return variants_of
