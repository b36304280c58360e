"""What a task is: a named source of input-output examples."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

NULL = "Null"
"""The name of the task without a rule (Han et al. 2025, §4), whose answers are random."""


@dataclass(frozen=True)
class Example:
    """One input-output pair of a task, as text.

    Attributes:
        x: The input.
        y: The output.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> tv.Example("cat", "cats")
        Example(x='cat', y='cats')
    """

    x: str
    y: str


@runtime_checkable
class Task(Protocol):
    """A named source of examples with distinct inputs.

    Any object with these two members is a task. A task with a limited number of distinct inputs
    gives that number as its ``__len__``; one without ``__len__`` is taken to be unlimited.

    Example:
        >>> import random
        >>> from dataclasses import dataclass
        >>> import transformer_lens_taskvec as tv
        >>> @dataclass(frozen=True)
        ... class Length:
        ...     name: str = "length"
        ...     def sample(self, n, rng):
        ...         words = ["a", "bee", "fly", "moth", "spider"]
        ...         return [tv.Example(word, str(len(word))) for word in rng.sample(words, n)]
        ...     def __len__(self):
        ...         return 5
        >>> isinstance(Length(), tv.Task), len(Length().sample(3, random.Random(0)))
        (True, 3)
    """

    @property
    def name(self) -> str:
        """The name under which results list the task."""
        ...

    def sample(self, n: int, rng: random.Random) -> list[Example]:
        """Return ``n`` examples with distinct inputs; ``rng`` is the only source of randomness."""
        ...


@dataclass(frozen=True)
class MappingTask:
    """A task defined by a list of pairs; made by :func:`mapping_task`.

    Attributes:
        name: The task's name in results.
        pairs: The pairs, with distinct inputs.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> tv.mapping_task("plural", {"cat": "cats", "dog": "dogs"})
        MappingTask('plural', 2 pairs: 'cat' -> 'cats', 'dog' -> 'dogs')
    """

    name: str
    pairs: tuple[Example, ...]

    def __len__(self) -> int:
        return len(self.pairs)

    def __repr__(self) -> str:
        first = ", ".join(f"{pair.x!r} -> {pair.y!r}" for pair in self.pairs[:2])
        more = ", ..." if len(self.pairs) > 2 else ""
        return f"MappingTask({self.name!r}, {len(self.pairs)} pairs: {first}{more})"

    def sample(self, n: int, rng: random.Random) -> list[Example]:
        """Return ``n`` of the pairs, drawn without replacement.

        Raises:
            ValueError: If ``n`` is more than the number of pairs.
        """
        check_sample_size(self.name, n, len(self.pairs))
        return rng.sample(self.pairs, n)


def mapping_task(
    name: str, pairs: Mapping[str, str] | Iterable[Example] | Iterable[tuple[str, str]]
) -> MappingTask:
    """Return the task with the given input-output pairs.

    Args:
        name: The task's name in results.
        pairs: ``{x: y}``, or :class:`Example` objects, or ``(x, y)`` tuples.

    Returns:
        The task, its pairs in the given order.

    Raises:
        ValueError: If there are no pairs, a text is empty, or an input occurs twice.

    Example:
        >>> import random
        >>> import transformer_lens_taskvec as tv
        >>> colours = tv.mapping_task("colours", {"sky": "blue", "grass": "green"})
        >>> sorted(example.y for example in colours.sample(2, random.Random(0)))
        ['blue', 'green']
    """
    items = pairs.items() if isinstance(pairs, Mapping) else pairs
    examples = tuple(item if isinstance(item, Example) else Example(*item) for item in items)
    if not examples:
        raise ValueError(f"task {name!r} has no pairs; give at least one input-output pair")
    seen: set[str] = set()
    for example in examples:
        for side, text in (("input", example.x), ("output", example.y)):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"task {name!r} has an empty or non-text {side} in {example!r}")
        if example.x in seen:
            raise ValueError(
                f"task {name!r} gives the input {example.x!r} twice; inputs must be distinct"
            )
        seen.add(example.x)
    return MappingTask(name, examples)


def check_sample_size(name: str, n: int, available: int) -> None:
    """Raise ``ValueError`` unless a task with ``available`` inputs can give ``n`` of them."""
    if n < 0:
        raise ValueError(f"task {name!r} was asked for {n} examples; ask for 0 or more")
    if n > available:
        raise ValueError(
            f"task {name!r} was asked for {n} examples with distinct inputs and has {available}; "
            "ask for fewer examples or shots"
        )


def by_name(tasks: Sequence[Task]) -> dict[str, Task]:
    """Return the tasks by name, in order."""
    return {task.name: task for task in tasks}
