"""Task vectors as features of a dictionary: which ones, and how well they add up.

A task vector is a mean or a difference of activations, and so not what a dictionary was trained to
encode: its features are reported next to those of random vectors of the same norm, and to the mean
of the encodings of the activations it is the mean of. Keeping or dropping the features that set a
task apart follows Lim et al. (2025), who do so for classes of images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec.activations import Activations, check_finite
from transformer_lens_taskvec.vectors.base import TaskVectors
from transformer_lens_taskvec.vectors.encoding import check_dictionary, check_place, decode, encode

VECTOR, MEAN = "vector", "mean of encodings"
"""Where features come from: the encoding of the vector, or the mean of its activations' encodings.
"""

_DRAWS = 16
"""Random vectors per task, over which their numbers are averaged."""


@dataclass(frozen=True)
class Reconstruction:
    """How well features add up to what they encode, by task.

    Attributes:
        error: ``[task]``, ``|decode(f) - v| / |v|``: 0 is exact, 1 as bad as nothing.
        cosine: ``[task]``, between ``decode(f)`` and ``v``.
        l0: ``[task]``, the number of active features.
    """

    error: Float[Tensor, " task"]
    cosine: Float[Tensor, " task"]
    l0: Float[Tensor, " task"]


@dataclass(frozen=True, repr=False)
class Decomposition(Shown):
    """The features of task vectors at one layer.

    Attributes:
        features: ``[task, feature]``, those of the vectors.
        vectors: The task vectors, of the one layer.
        dictionary: What encoded them.
        reconstructions: How well the features add up, by what was encoded: ``"vector"``;
            ``"random"``, random vectors of the same norm; and with activations ``"mean of
            encodings"``, against the vector, and ``"prompts"``, the mean over a task's prompts of
            each activation by itself, which is what the dictionary was made for.
        mean_features: ``[task, feature]``, the mean of the encodings; None without activations.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.find_tasks(["XOR", "OR"]), 8, 4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, episodes, layers=[1]))
        >>> tokens = tv.vectors.residuals(model, episodes, 1)
        >>> dictionary = tv.vectors.train_dictionary(tokens, n_features=16, k=4, steps=5)
        >>> tv.vectors.decompose(vectors, dictionary, 1).features.shape
        torch.Size([2, 16])
    """

    features: Float[Tensor, "task feature"]
    vectors: TaskVectors
    dictionary: Any
    reconstructions: Mapping[str, Reconstruction]
    mean_features: Float[Tensor, "task feature"] | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names."""
        return self.vectors.tasks

    @property
    def layer(self) -> int:
        """The layer, counted from 0."""
        return self.vectors.layers[0]

    def features_of(self, of: str = VECTOR) -> Float[Tensor, "task feature"]:
        """Return the features of the vectors, or the mean of their activations' encodings.

        Args:
            of: ``"vector"`` or ``"mean of encodings"``.

        Raises:
            ValueError: If it is neither, or there were no activations.
        """
        if of not in (VECTOR, MEAN):
            raise ValueError(f"of is {of!r}; it must be {VECTOR!r} or {MEAN!r}")
        found = self.features if of == VECTOR else self.mean_features
        if found is None:
            raise ValueError(f"of is {of!r}, which needs decompose(..., activations=...)")
        return found

    def top(self, task: str, k: int = 10, *, of: str = VECTOR) -> tuple[int, ...]:
        """Return the active features that set a task apart most, the first the most.

        What counts is a feature's activation minus its mean over the other tasks.

        Args:
            task: One of ``tasks``.
            k: The most features to return.
            of: As for :meth:`features_of`.

        Raises:
            KeyError: If there is no such task.
        """
        if task not in self.tasks:
            raise KeyError(f"no vector for task {task!r}; there are: {', '.join(self.tasks)}")
        own = self.features_of(of)
        row = self.tasks.index(task)
        active = int((own[row] > 0).sum())
        return tuple(ranks_of(own)[row].argsort()[: min(k, active)].tolist())

    def keep(self, k: int, *, of: str = VECTOR) -> TaskVectors:
        """Return the vectors' reconstructions from each task's top ``k`` features alone.

        Args:
            k: The number of features, in the order of :meth:`top`; all active ones if there are
                fewer.
            of: As for :meth:`features_of`.

        Raises:
            ValueError: If ``k`` is negative, or as for :meth:`features_of`.
        """
        own = self.features_of(of)
        return self.reconstruct(own * (ranks_of(own) < _number(k)))

    def drop(self, k: int, *, of: str = VECTOR) -> TaskVectors:
        """Return the vectors' reconstructions without each task's top ``k`` features.

        The arguments are those of :meth:`keep`.
        """
        own = self.features_of(of)
        return self.reconstruct(own * (ranks_of(own) >= _number(k)))

    def reconstruct(self, features: Float[Tensor, "task feature"]) -> TaskVectors:
        """Return what features of each task add up to, in the place of the task vectors."""
        values = rearrange(decode(self.dictionary, features), "task d -> task 1 d")
        return replace(self.vectors, values=values)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per task and encoded vector: ``task, encoded, error, cosine, l0``."""
        rows = [
            {
                "task": task,
                "encoded": name,
                "error": float(of.error[row]),
                "cosine": float(of.cosine[row]),
                "l0": float(of.l0[row]),
            }
            for row, task in enumerate(self.tasks)
            for name, of in self.reconstructions.items()
        ]
        return pd.DataFrame(rows)

    def top_frame(self, k: int = 10, *, of: str = VECTOR) -> pd.DataFrame:
        """Return each task's top features: ``task, rank, feature, activation, excess``.

        Ranks begin at 1; ``excess`` is the activation minus its mean over the other tasks.
        """
        own = self.features_of(of)
        excess = _excess(own)
        rows = [
            {
                "task": task,
                "rank": rank,
                "feature": feature,
                "activation": float(own[row, feature]),
                "excess": float(excess[row, feature]),
            }
            for row, task in enumerate(self.tasks)
            for rank, feature in enumerate(self.top(task, k, of=of), start=1)
        ]
        return pd.DataFrame(rows, columns=["task", "rank", "feature", "activation", "excess"])

    def __repr__(self) -> str:
        numbers = "; ".join(
            f"{name}: error {float(of.error.mean()):.2f}, L0 {float(of.l0.mean()):.1f}"
            for name, of in self.reconstructions.items()
        )
        size = f"{len(self.tasks)} tasks, {self.features.shape[1]} features"
        return f"Decomposition({size}, layer {self.layer}; {numbers})"


def decompose(
    vectors: TaskVectors,
    dictionary: Any,
    layer: int,
    *,
    activations: Activations | None = None,
    seed: int = 0,
) -> Decomposition:
    """Return the dictionary's features of each task's vector at one layer.

    Args:
        vectors: Task vectors; not those of a hook with an axis of heads.
        dictionary: A :class:`Dictionary` of the vectors' place in the model.
        layer: The layer, counted from 0.
        activations: The activations that the vectors are the means of, to encode each by itself.
        seed: Seed of the random vectors.

    Raises:
        ValueError: If there is no such layer, the object is no dictionary or keeps what it encoded
            last, it belongs to another model, hook or layer, the widths differ, or activations
            lack the hook, the layer or a task.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> from transformer_lens_taskvec.vectors.all_tokens import residuals
        >>> from transformer_lens_taskvec.vectors.dictionary import train_dictionary
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 20, 4, seed=0)
        >>> tokens = residuals(model, episodes, 1, 2000)
        >>> dictionary = train_dictionary(tokens, n_features=256, k=16, steps=150, batch_size=256)
        >>> activations = tv.collect(model, episodes, layers=[1])
        >>> vectors = tv.task_vectors(activations)
        >>> found = decompose(vectors, dictionary, 1, activations=activations)
        >>> list(found.reconstructions)
        ['vector', 'random', 'mean of encodings', 'prompts']
        >>> own, random = (found.reconstructions[name].error for name in ("vector", "random"))
        >>> bool((own < 0.7 * random).all())
        True
        >>> found.keep(5)
        TaskVectors(6 tasks x 1 layers x 64, resid_post of toy@1500: AND, NAND, OR, NOR, XOR, XNOR)
    """
    here = check_fits(vectors, dictionary, layer)
    values = here.at(layer)
    features = encode(dictionary, values)
    reconstructions = {VECTOR: _compare(features, decode(dictionary, features), values)}
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(values), _DRAWS, values.shape[1], generator=generator)
    unit = torch.nn.functional.normalize(noise, dim=-1)
    lengths = rearrange(values.norm(dim=-1), "task -> task 1 1")
    random = rearrange(unit * lengths, "task draw d -> (task draw) d")
    of_draw = repeat(torch.arange(len(values)), "task -> (task draw)", draw=_DRAWS)
    reconstructions["random"], _ = _by_group(dictionary, random, of_draw, len(values))
    means = None
    if activations is not None:
        rows, of_row = _of_tasks(activations, here)
        alone, means = _by_group(dictionary, rows, of_row, len(values))
        reconstructions[MEAN] = _compare(means, decode(dictionary, means), values)
        reconstructions["prompts"] = alone
    return Decomposition(features, here, dictionary, reconstructions, means)


def check_fits(vectors: TaskVectors, dictionary: Any, layer: int) -> TaskVectors:
    """Return the vectors of one layer, or raise ``ValueError`` unless the dictionary encodes them.

    Args:
        vectors: Task vectors.
        dictionary: The dictionary.
        layer: The layer, counted from 0.
    """
    check_dictionary(dictionary)
    values = vectors.at(layer)
    if values.ndim != 2:
        raise ValueError(
            f"the vectors have an axis of heads at {vectors.source.hook!r}, and a dictionary "
            "encodes [d]; give vectors of the residual stream or of a whole sublayer's output"
        )
    source = vectors.source
    check_place(dictionary, source.model, source.weights, source.hook, layer)
    rows = getattr(dictionary, "W_dec", None)
    if isinstance(rows, Tensor) and rows.shape[-1] != values.shape[1]:
        raise ValueError(
            f"the dictionary has width {rows.shape[-1]}, the vectors {values.shape[1]}; use one "
            "that was trained at the vectors' place"
        )
    return replace(vectors, values=values[:, None], layers=(layer,))


def _compare(
    features: Float[Tensor, "row feature"],
    decoded: Float[Tensor, "row d"],
    values: Float[Tensor, "row d"],
) -> Reconstruction:
    error = (decoded - values).norm(dim=1) / values.norm(dim=1)
    cosine = torch.nn.functional.cosine_similarity(decoded, values, dim=1)
    return Reconstruction(error, cosine, (features > 0).sum(dim=1).float())


def _by_group(
    dictionary: Any, values: Float[Tensor, "row d"], group: Int[Tensor, " row"], n_groups: int
) -> tuple[Reconstruction, Float[Tensor, "group feature"]]:
    """Return the mean numbers and the mean features of groups of vectors."""
    found, means = [], []
    for one in range(n_groups):
        own = values[group == one]
        features = encode(dictionary, own)
        compared = _compare(features, decode(dictionary, features), own)
        found.append([compared.error.mean(), compared.cosine.mean(), compared.l0.mean()])
        means.append(reduce(features.double(), "row feature -> feature", "mean").float())
    error, cosine, l0 = (torch.stack(column) for column in zip(*found, strict=True))
    return Reconstruction(error, cosine, l0), torch.stack(means)


def _of_tasks(
    activations: Activations, vectors: TaskVectors
) -> tuple[Float[Tensor, "row d"], Int[Tensor, " row"]]:
    """Return the activations at the vectors' layer, and the index of each one's task there."""
    check_finite(activations)
    missing = set(vectors.tasks) - set(activations.tasks)
    if missing or activations.hook != vectors.source.hook:
        what = f"lack {', '.join(sorted(missing))}" if missing else f"are of {activations.hook!r}"
        raise ValueError(
            f"activations {what}, and the vectors are of {vectors.source.hook!r} and of "
            f"{', '.join(vectors.tasks)}; give those that the vectors are the means of"
        )
    index = {task: row for row, task in enumerate(vectors.tasks)}
    row_of = torch.tensor([index.get(task, -1) for task in activations.tasks])
    return activations.at(vectors.layers[0]), row_of[activations.labels]


def _excess(features: Float[Tensor, "task feature"]) -> Float[Tensor, "task feature"]:
    n_others = max(1, len(features) - 1)
    return features - (reduce(features, "task f -> 1 f", "sum") - features) / n_others


def ranks_of(features: Float[Tensor, "task feature"]) -> Int[Tensor, "task feature"]:
    """Return each feature's rank in its task, from 0: active ones first, those by excess."""
    order = _excess(features).masked_fill(features <= 0, -torch.inf)
    return order.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def _number(k: int) -> int:
    if k < 0:
        raise ValueError(f"k is {k}; it must be at least 0")
    return k
