"""What each task's vector does to the episodes of each task (Han et al. 2025, Figure 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec._utils.statistics import bootstrap_interval
from transformer_lens_taskvec.interventions.intervention import inject
from transformer_lens_taskvec.interventions.modes import Mode
from transformer_lens_taskvec.interventions.packed import Variant
from transformer_lens_taskvec.prompts import AnyEpisode
from transformer_lens_taskvec.scoring import Scores, evaluate_many
from transformer_lens_taskvec.vectors.base import TaskVectors


@dataclass(frozen=True, repr=False)
class PerturbationMatrix(Shown):
    """What each task's vector does to the episodes of each task (the paper's Figure 7).

    Attributes:
        nll: ``[source, target]``, change in the mean NLL of the source task's answers, in nats,
            when the target task's vector is injected.
        accuracy: ``[source, target]``, change in the source task's accuracy.
        nll_interval: ``[source, target, 2]``, the 95 % interval of ``nll`` by a bootstrap.
        sources: The tasks of the episodes.
        targets: The tasks of the vectors.
        layer: The layer of the injection.
        baseline: The episodes without intervention.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, episodes))
        >>> matrix = tv.perturbation_matrix(model, episodes, vectors, layer=1)
        >>> matrix.nll.shape
        torch.Size([6, 6])
        >>> matrix.conditional_decoding > 5  # nats: the answers hang on the right vector
        True
    """

    nll: Float[Tensor, "source target"]
    accuracy: Float[Tensor, "source target"]
    nll_interval: Float[Tensor, "source target 2"]
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    layer: int
    baseline: Scores

    @property
    def conditional_decoding(self) -> float:
        """Mean change in NLL off the diagonal less the mean on it, in nats.

        It tells how far the answers depend on the vector being the right one.
        """
        own = torch.tensor([[s == t for t in self.targets] for s in self.sources])
        return float(self.nll[~own].mean() - self.nll[own].mean())

    def to_frame(self) -> pd.DataFrame:
        """One row a source and target: ``source, target, nll, nll_low, nll_high, accuracy``.

        They are changes; the interval is ``nll_interval``.
        """
        return pd.DataFrame(
            [
                {
                    "source": source,
                    "target": target,
                    "nll": float(self.nll[row, column]),
                    "nll_low": float(self.nll_interval[row, column, 0]),
                    "nll_high": float(self.nll_interval[row, column, 1]),
                    "accuracy": float(self.accuracy[row, column]),
                }
                for row, source in enumerate(self.sources)
                for column, target in enumerate(self.targets)
            ]
        )

    def __repr__(self) -> str:
        return (
            f"PerturbationMatrix(layer {self.layer}, {len(self.sources)} sources x "
            f"{len(self.targets)} targets; conditional decoding "
            f"{self.conditional_decoding:.3f} of {self.baseline.loss})"
        )


def perturbation_matrix(
    model: Any,
    episodes: Sequence[AnyEpisode],
    vectors: TaskVectors,
    layer: int,
    *,
    mode: Mode = "replace",
    scale: float = 1.0,
    position: int | Sequence[int] | None = -1,
    stop: str | None = None,
    max_tokens: int | None = None,
) -> PerturbationMatrix:
    """Inject every task's vector into the episodes of every task (Han et al. 2025, Figure 7).

    Args:
        model: The model that the vectors come from.
        episodes: Usually few-shot ones.
        vectors: The vectors; their tasks are the columns.
        layer: The layer, counted from 0.
        mode: As for :func:`inject`.
        scale: As for :func:`inject`.
        position: As for :func:`inject`.
        stop: As for :func:`evaluate`.
        max_tokens: As for :func:`evaluate`.

    Returns:
        Changes in NLL and accuracy, ``[source task, target vector]``.

    Raises:
        ValueError: If there is no such layer, or the vectors are another model's.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, episodes))
        >>> matrix = tv.perturbation_matrix(model, episodes, vectors, layer=1)
        >>> row, column = matrix.sources.index("AND"), matrix.targets.index("NAND")
        >>> bool(matrix.nll[row, column] > 1), round(float(matrix.accuracy[row, row]), 1)
        (True, 0.0)
    """
    vectors.check_model(model)
    edits: dict[str, Variant] = {
        task: [
            inject(
                vectors.at(task, layer),
                layer,
                mode=mode,
                scale=scale,
                position=position,
                hook=vectors.source.hook,
            )
        ]
        for task in vectors.tasks
    }
    bos = vectors.source.prepend_bos
    return matrix_of_edits(
        model, episodes, edits, layer, stop=stop, prepend_bos=bos, max_tokens=max_tokens
    )


def matrix_of_edits(
    model: Any,
    episodes: Sequence[AnyEpisode],
    edits: Mapping[str, Variant],
    layer: int,
    *,
    stop: str | None = None,
    prepend_bos: bool = False,
    max_tokens: int | None = None,
) -> PerturbationMatrix:
    """A perturbation matrix of any edits, one column each.

    Args:
        model: Any model with TransformerLens' hook API.
        episodes: The episodes; their tasks are the rows.
        edits: For each target the interventions that stand for it.
        layer: The layer they act in, for the record.
        stop: As for :func:`evaluate`.
        prepend_bos: As for :func:`evaluate`.
        max_tokens: As for :func:`evaluate`.
    """
    scores = evaluate_many(
        model,
        episodes,
        [[], *edits.values()],
        stop=stop,
        prepend_bos=prepend_bos,
        max_tokens=max_tokens,
    )
    tasks = scores[0].tasks
    own = [scores[0].labels == index for index in range(len(tasks))]
    before, after = scores[0], scores[1:]
    nll = torch.stack([s.nll.double() for s in after]) - before.nll.double()
    accuracy = torch.stack([s.correct.double() for s in after]) - before.correct.double()
    return PerturbationMatrix(
        torch.stack([nll[:, rows].mean(dim=1) for rows in own]),
        torch.stack([accuracy[:, rows].mean(dim=1) for rows in own]),
        torch.stack([bootstrap_interval(nll[:, rows]) for rows in own]),
        tasks,
        tuple(edits),
        layer,
        scores[0],
    )
