"""The methods that are compared: how each makes vectors of training episodes, and its choices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformer_lens_taskvec.activations import collect
from transformer_lens_taskvec.prompts import AnyEpisode, zero_shot
from transformer_lens_taskvec.vectors.base import Injectable, TaskVectors
from transformer_lens_taskvec.vectors.contrast import (
    contrast_vectors,
    in_context_vectors,
    instruction_vectors,
)
from transformer_lens_taskvec.vectors.head_weights import learn_head_weights
from transformer_lens_taskvec.vectors.heads import function_vectors, head_effects
from transformer_lens_taskvec.vectors.learned import learn_vectors
from transformer_lens_taskvec.vectors.linear import linear_maps
from transformer_lens_taskvec.vectors.means import task_vectors
from transformer_lens_taskvec.vectors.separators import separator_means, separator_vectors
from transformer_lens_taskvec.vectors.states import state_vectors

Make = Callable[[Any, Sequence[Any]], Injectable]
"""Makes what is injected from a model and few-shot training episodes."""


@dataclass(frozen=True)
class Method:
    """A way of making task vectors.

    Attributes:
        name: Its name in tables.
        make: ``(model, train episodes) -> Injectable``.
        source: The paper.
        scales: The scales to choose from on the dev episodes, next to the layers.
        shots: How many demonstrations the prompts have that it is injected in.
        together: Whether it is made from all tasks' episodes at once; otherwise of each task's.
        learned: Whether it is trained by gradient.
        again: ``(model, other train episodes, vectors) -> Injectable`` with the choices that were
            made for the vectors, such as heads; None if the method makes none.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> mine = Method("mine", lambda model, train: tv.task_vectors(tv.collect(model, train)))
        >>> mine.scales, mine.shots
        ((1.0,), 0)
    """

    name: str
    make: Make
    source: str = ""
    scales: tuple[float, ...] = (1.0,)
    shots: int = 0
    together: bool = False
    learned: bool = False
    again: Callable[[Any, Sequence[Any], Any], Injectable] | None = None


def _means(model: Any, train: Sequence[AnyEpisode]) -> Injectable:
    return task_vectors(collect(model, train))


def _of_one_prompt(model: Any, train: Sequence[AnyEpisode]) -> Injectable:
    first = {episode.task: episode for episode in reversed(train)}
    return task_vectors(collect(model, list(first.values())))


def _separators(model: Any, train: Sequence[Any]) -> Injectable:
    return separator_means(model, train, hook="resid_post", mode="replace")


_SCREENED = 60
"""Heads that are measured for function vectors, of those that attribution ranks highest."""


def _function_vectors(model: Any, train: Sequence[Any]) -> Injectable:
    n_heads = int(model.cfg.n_layers) * int(model.cfg.n_heads)
    effects = head_effects(model, train, screen=min(_SCREENED, n_heads))
    return function_vectors(model, train, min(10, n_heads), effects=effects)


def _same_heads(model: Any, train: Sequence[Any], vectors: TaskVectors) -> Injectable:
    return function_vectors(model, train, heads=vectors.source.heads)


def _learned(model: Any, train: Sequence[Any]) -> Injectable:
    layers = _some_layers(model)
    means = task_vectors(collect(model, train, layers=layers))
    return learn_vectors(model, zero_shot(train), layers=layers, start=means)


def _learned_added(model: Any, train: Sequence[Any]) -> Injectable:
    return learn_vectors(model, zero_shot(train), layers=_some_layers(model), mode="add")


def _several(model: Any, train: Sequence[Any]) -> Injectable:
    return separator_vectors(model, train, n_separators=_FEW + 1, layers=_some_layers(model))


def _single(model: Any, train: Sequence[Any]) -> Injectable:
    return task_vectors(collect(model, train, layers=_some_layers(model)))


_FEW = 2
"""Demonstrations in the prompts that vectors at several separators are put in."""


def _some_layers(model: Any) -> list[int]:
    """Return about eight layers, for methods of which every layer costs as much."""
    n_layers = int(model.cfg.n_layers)
    step = -(-n_layers // 8)
    return list(range(step - 1, n_layers, step))


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("mean", _means, "Hendel et al. 2023; Han et al. 2025"),
        Method("one prompt", _of_one_prompt, "Hendel et al. 2023"),
        Method("separator mean", _separators, "Kharlapenko et al. 2025"),
        Method("contrast", contrast_vectors, "few-shot minus zero-shot means"),
        Method("linear map", linear_maps, "Kwon et al. 2026"),
        Method("in-context vector", in_context_vectors, "Liu et al. 2023", scales=(1.0, 3.0)),
        Method("state vector", state_vectors, "Li et al. 2024"),
        Method(
            "function vector",
            _function_vectors,
            "Todd et al. 2023",
            scales=(1.0, 2.0, 4.0),
            together=True,
            again=_same_heads,
        ),
        Method("instruction", instruction_vectors, "Luo et al. 2024"),
        Method("one of few shots", _single, "Hendel et al. 2023", shots=_FEW),
        Method("several of few shots", _several, "Dong et al. 2026", shots=_FEW),
        Method("head weights", learn_head_weights, "Saglam et al. 2025", learned=True),
        Method("learned", _learned, "Yang, Cho et al. 2026", learned=True),
        Method("learned, added", _learned_added, "Yang, Cho et al. 2026", learned=True),
    )
}
"""The methods by name; a row of your own is one :class:`benchmark.Method`."""

EXTRACTED = tuple(name for name, method in METHODS.items() if not method.learned)
"""The names of those that need no gradients."""


def chosen_methods(
    methods: Iterable[str | Method] | Mapping[str, Make] | None,
) -> list[Method]:
    """Return methods by name, or as they are.

    Args:
        methods: Names in :data:`METHODS`, methods, or functions by name; None for
            :data:`EXTRACTED`.

    Raises:
        ValueError: If there are none, a name is unknown, or a name occurs twice.
    """
    given: Iterable[Any] = EXTRACTED if methods is None else methods
    if isinstance(methods, Mapping):
        given = [Method(name, make) for name, make in methods.items()]
    found = []
    for one in [given] if isinstance(given, str) else given:
        if isinstance(one, str) and one not in METHODS:
            raise ValueError(f"no method {one!r}; there are: {', '.join(METHODS)}")
        found.append(METHODS[one] if isinstance(one, str) else one)
    names = [method.name for method in found]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"methods are {names}; give one or more, each with a name of its own")
    return found
