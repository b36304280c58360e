"""Task-vector cleaning: the few features of a dictionary that do a task (Kharlapenko et al. 2025).

A task vector's encoding has many features, most of them of no use for the task. With ``p`` their
activations, the vector ``decode(f)`` of ``f_i = p_i if p_i > threshold_i else 0`` is trained to
give the answers of zero-shot prompts with few features::

    minimise over p    NLL of the answers under decode(f)  +  l1 * |f|_1

Only features that the encoding has can be active, and one that was shut off gets no gradient and
stays off, so the set of active features can only shrink.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec.activations import Source
from transformer_lens_taskvec.interventions.gradients import descend
from transformer_lens_taskvec.interventions.intervention import Intervention, altered, inject
from transformer_lens_taskvec.interventions.modes import Mode
from transformer_lens_taskvec.interventions.variants import Variant
from transformer_lens_taskvec.models.layouts import check_readable
from transformer_lens_taskvec.models.tokens import Separator
from transformer_lens_taskvec.prompts import AnyEpisode
from transformer_lens_taskvec.vectors.base import TaskVectors, check_tasks, check_vectors
from transformer_lens_taskvec.vectors.encoding import decode, encode, like
from transformer_lens_taskvec.vectors.learned import TRAINABLE
from transformer_lens_taskvec.vectors.sparse import check_fits


@dataclass(frozen=True, repr=False)
class SparseVectors(Shown):
    """Task vectors that are sums of a few features.

    Attributes:
        vectors: The vectors, of one layer.
        features: ``[task, feature]``, the activations of the features that are left.
        start: ``[task, feature]``, those of the vectors before.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.find_tasks(["XOR", "OR"]), 8, 4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, episodes, layers=[1]))
        >>> tokens = tv.vectors.residuals(model, episodes, 1)
        >>> dictionary = tv.vectors.train_dictionary(tokens, n_features=16, k=4, steps=5)
        >>> bare = tv.zero_shot(episodes)
        >>> tv.vectors.clean_vectors(model, bare, vectors, dictionary, 1, steps=1).features.shape
        torch.Size([2, 16])
    """

    vectors: TaskVectors
    features: Float[Tensor, "task feature"]
    start: Float[Tensor, "task feature"]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names."""
        return self.vectors.tasks

    @property
    def layers(self) -> tuple[int, ...]:
        """The one layer."""
        return self.vectors.layers

    @property
    def source(self) -> Source:
        """Where the vectors come from, and the mode they were trained in."""
        return self.vectors.source

    @property
    def l0(self) -> dict[str, int]:
        """The number of active features by task."""
        return dict(zip(self.tasks, (self.features > 0).sum(dim=1).tolist(), strict=True))

    @property
    def l0_before(self) -> dict[str, int]:
        """The number of active features by task, before cleaning."""
        return dict(zip(self.tasks, (self.start > 0).sum(dim=1).tolist(), strict=True))

    def inject(
        self,
        task: str,
        layer: int | None,
        *,
        mode: Mode | None = None,
        scale: float = 1.0,
        relative: bool = False,
        position: int | Sequence[int] | Separator | None = -1,
    ) -> list[Intervention]:
        """Return the intervention that injects a task's vector; as for :meth:`Injectable.inject`.

        Raises:
            KeyError: If there is no such task.
            ValueError: If there is no such layer, or as for :func:`inject`.
        """
        return self.vectors.inject(
            task, layer, mode=mode, scale=scale, relative=relative, position=position
        )

    def active(self, task: str) -> tuple[int, ...]:
        """Return a task's active features, the most active first.

        Raises:
            KeyError: If there is no such task.
        """
        if task not in self.tasks:
            raise KeyError(f"no vector for task {task!r}; there are: {', '.join(self.tasks)}")
        own = self.features[self.tasks.index(task)]
        return tuple(own.argsort(descending=True, stable=True)[: self.l0[task]].tolist())

    def to_frame(self) -> pd.DataFrame:
        """Return one row per task and active feature: ``task, feature, activation, before``."""
        rows = [
            {
                "task": task,
                "feature": feature,
                "activation": float(self.features[row, feature]),
                "before": float(self.start[row, feature]),
            }
            for row, task in enumerate(self.tasks)
            for feature in self.active(task)
        ]
        return pd.DataFrame(rows, columns=["task", "feature", "activation", "before"])

    def __repr__(self) -> str:
        before = self.l0_before
        counts = "; ".join(f"{task} {before[task]} -> {n}" for task, n in self.l0.items())
        return (
            f"SparseVectors({self.source.hook} of layer {self.layers[0]} of {self.source.model}, "
            f"active features: {counts})"
        )


def clean_vectors(
    model: Any,
    episodes: Sequence[AnyEpisode],
    vectors: TaskVectors,
    dictionary: Any,
    layer: int,
    *,
    l1: float = 0.05,
    steps: int = 300,
    rate: float = 0.01,
    batch_size: int = 24,
    mode: str | None = None,
    stop: str | None = None,
    seed: int = 0,
    report: Callable[[str, int, float], None] | None = None,
    progress: bool = False,
) -> SparseVectors:
    """Return task vectors made of the few features that it takes to give the answers.

    Activations are measured in units of the median of the task's active features, so that ``l1``
    and ``rate`` mean the same in every dictionary: a feature of median size costs ``l1`` nats, and
    a step changes a feature by about ``rate`` times that size. In the paper both are in the
    dictionary's own units, at most 1,000 steps are taken, fewer if no feature falls away for 200,
    and the vector is added to ``resid_pre``.

    Args:
        model: Any model with TransformerLens' hook API through which gradients flow.
        episodes: What to train on, usually zero-shot episodes; those of one task train its vector.
        vectors: The task vectors to clean.
        dictionary: A :class:`Dictionary` of the vectors' place, through whose ``decode`` gradients
            flow.
        layer: The layer, counted from 0.
        l1: The price of features, in nats.
        steps: The number of steps per task.
        rate: Adam's.
        batch_size: Episodes per step.
        mode: ``"replace"`` or ``"add"``; the vectors' own by default.
        stop: As for :func:`evaluate`.
        seed: Seed of the order of the episodes.
        report: Called in every step with the task, the step and the answers' mean loss before it.
        progress: Whether to show a progress bar.

    Returns:
        The vectors of the tasks that have episodes, at the one layer, with the mode they were
        trained in.

    Raises:
        ValueError: If the mode cannot be trained, ``l1`` is negative, a task's vector has no active
            feature, or as for :func:`decompose` and :func:`descend`.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> from transformer_lens_taskvec.vectors.all_tokens import residuals
        >>> from transformer_lens_taskvec.vectors.dictionary import train_dictionary
        >>> model = tv.load_model("toy")
        >>> sizes = {"train": 10, "test": 10}
        >>> sets = tv.sample_splits(tv.find_tasks(["XOR", "OR"]), sizes, n_shots=4, seed=0)
        >>> tokens = residuals(model, sets["train"], 1)
        >>> dictionary = train_dictionary(tokens, n_features=256, k=16, steps=150, batch_size=256)
        >>> vectors = tv.task_vectors(tv.collect(model, sets["train"]))
        >>> train = tv.zero_shot(sets["train"])
        >>> clean = clean_vectors(model, train, vectors, dictionary, 1, steps=100, rate=0.03)
        >>> all(clean.l0[task] < clean.l0_before[task] for task in clean.tasks)
        True
        >>> sweep = tv.layer_sweep(model, tv.zero_shot(sets["test"]), clean)
        >>> bool((sweep.at(1) > sweep.baseline_accuracy).all())
        True
    """
    chosen = vectors.source.mode if mode is None else mode
    if chosen not in TRAINABLE:
        raise ValueError(f"mode is {chosen!r}; vectors are trained to {' or to '.join(TRAINABLE)}")
    if not 0 <= l1 < float("inf"):
        raise ValueError(f"l1 is {l1}; it must be at least 0, and finite")
    here = check_fits(vectors, dictionary, layer)
    check_tasks(here, episodes)
    check_vectors(here, model, episodes)
    check_readable(model, [layer], here.source.hook)
    asked = {episode.task for episode in episodes}
    tasks = tuple(task for task in here.tasks if task in asked)
    start = encode(dictionary, torch.stack([here[task, layer] for task in tasks]))
    empty = [task for task, own in zip(tasks, start, strict=True) if not bool((own > 0).any())]
    if empty:
        raise ValueError(
            f"the dictionary has no active feature for the vectors of {', '.join(empty)}, so there "
            "is nothing to clean; use a dictionary that was trained at the vectors' place"
        )
    place = inject(here.values[0, 0], layer, mode=chosen, hook=here.source.hook)
    found = []
    with tqdm(total=len(tasks) * steps, disable=not progress, leave=False) as bar:
        for task, first in zip(tasks, start, strict=True):
            support = (first > 0).nonzero()[:, 0]
            size = first[support].median()
            limits = _thresholds(dictionary, len(first))[support]

            def active(p: Tensor, size: Tensor = size, limits: Tensor = limits) -> Tensor:
                own = p * size.to(p)
                return own * (own > limits.to(p))

            def variants_of(
                p: Tensor,
                active: Callable[[Tensor], Tensor] = active,
                support: Tensor = support,
                first: Tensor = first,
            ) -> list[Variant]:
                none = torch.zeros_like(first).to(p)
                features = none.index_add(0, support.to(p.device), active(p))
                vector = dictionary.decode(features.to(like(dictionary)))
                return [[altered(place, vector=vector.to(p))]]

            def penalty(
                p: Tensor, active: Callable[[Tensor], Tensor] = active, size: Tensor = size
            ) -> Tensor:
                return l1 * active(p).sum() / size.to(p)

            def of_step(step: int, losses: Tensor, task: str = task) -> None:
                bar.update()
                if report is not None:
                    report(task, step, float(losses))

            p = descend(
                model,
                [episode for episode in episodes if episode.task == task],
                first[support] / size,
                variants_of,
                steps=steps,
                batch_size=batch_size,
                rate=rate,
                penalty=penalty,
                stop=stop,
                seed=seed,
                report=of_step,
            )
            found.append(torch.zeros_like(first).index_add(0, support, active(p)))
    features = torch.stack(found)
    values = rearrange(decode(dictionary, features), "task d -> task 1 d")
    cleaned = TaskVectors(values, tasks, (layer,), replace(here.source, mode=chosen))
    return SparseVectors(cleaned, features, start)


def _thresholds(dictionary: Any, n: int) -> Float[Tensor, " feature"]:
    """Return what each feature's activation must exceed: JumpReLU's thresholds, zero elsewhere."""
    own = getattr(dictionary, "threshold", None)
    if isinstance(own, Tensor) and own.shape == (n,):
        return own.detach().to("cpu", torch.float32)
    return torch.zeros(n)
