"""The methods that are compared: how each makes vectors of training episodes, and its choices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformer_lens_taskvec.activations import collect
from transformer_lens_taskvec.prompts import AnyEpisode, zero_shot
from transformer_lens_taskvec.vectors.base import Injectable
from transformer_lens_taskvec.vectors.head_weights import learn_head_weights
from transformer_lens_taskvec.vectors.heads import function_vectors
from transformer_lens_taskvec.vectors.learned import learn_vectors
from transformer_lens_taskvec.vectors.means import task_vectors

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


def _means(model: Any, train: Sequence[AnyEpisode]) -> Injectable:
    return task_vectors(collect(model, train))


def _of_one_prompt(model: Any, train: Sequence[AnyEpisode]) -> Injectable:
    first = {episode.task: episode for episode in reversed(train)}
    return task_vectors(collect(model, list(first.values())))


def _learned(model: Any, train: Sequence[Any]) -> Injectable:
    return learn_vectors(model, zero_shot(train), start=task_vectors(collect(model, train)))


def _learned_added(model: Any, train: Sequence[Any]) -> Injectable:
    return learn_vectors(model, zero_shot(train), mode="add")


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("mean", _means, "Hendel et al. 2023; Han et al. 2025"),
        Method("one prompt", _of_one_prompt, "Hendel et al. 2023"),
        Method(
            "function vector",
            function_vectors,
            "Todd et al. 2023",
            scales=(1.0, 2.0, 4.0),
            together=True,
        ),
        Method("head weights", learn_head_weights, "Saglam et al. 2025", learned=True),
        Method("learned", _learned, "Yang, Cho et al. 2026", learned=True),
        Method("learned, added", _learned_added, "Yang, Cho et al. 2026", learned=True),
    )
}
"""The methods by name; a row of your own is one :class:`Method`."""

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
