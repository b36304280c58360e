"""Tasks in both directions: some inputs are mapped one way, others the other way."""

from __future__ import annotations

import random
from collections import Counter

from transformer_lens_taskvec.tasks.base import Example, MappingTask, Task, mapping_task


def bijection_task(
    forward: Task, backward: Task, *, name: str | None = None, seed: int = 0
) -> MappingTask:
    """Return the task of two that undo each other, half of the pairs one way and half the other.

    No single vector that is added to a state does both, where each alone may work (Dong et al.
    2026). A pair is in the task in one direction only, so that a demonstration never gives away the
    answer to a query. Words that stand on both sides of different pairs, or twice on one, have no
    one answer: their pairs are left out.

    Args:
        forward: A task made of pairs, such as ``en_fr``.
        backward: The task of the same pairs reversed, such as ``fr_en``.
        name: The task's name in results; by default both names with a plus between them.
        seed: Seed of the choice of directions.

    Returns:
        The task, its pairs in the order of ``forward``.

    Raises:
        ValueError: If one of the tasks is not made of pairs, they do not undo each other, or fewer
            than two pairs are left.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> tasks = tv.find_tasks(["singular_plural", "plural_singular"])
        >>> bijection_task(tasks["singular_plural"], tasks["plural_singular"], name="number")
        MappingTask('number', 221 pairs: 'analyses' -> 'analysis', 'apple' -> 'apples', ...)
    """
    pairs = _pairs(forward)
    known = {(pair.x, pair.y) for pair in _pairs(backward)}
    missing = [pair for pair in pairs if (pair.y, pair.x) not in known]
    if missing or len(known) > len(pairs):
        shown = f"{missing[0]!r} is not reversed there" if missing else "there are others there"
        raise ValueError(
            f"task {backward.name!r} does not undo {forward.name!r}: {shown}. Give the task of the "
            "same pairs reversed, as mapping_task makes it of [(pair.y, pair.x), ...]"
        )
    counts = Counter(word for pair in pairs for word in (pair.x, pair.y))
    clear = [pair for pair in pairs if counts[pair.x] == counts[pair.y] == 1]
    if len(clear) < 2:
        raise ValueError(
            f"tasks {forward.name!r} and {backward.name!r} have {len(clear)} pairs whose words "
            "occur once; a task in both directions needs two or more"
        )
    turned = set(random.Random(seed).sample(range(len(clear)), len(clear) // 2))
    return mapping_task(
        name or f"{forward.name}+{backward.name}",
        [Example(pair.y, pair.x) if index in turned else pair for index, pair in enumerate(clear)],
    )


def _pairs(task: Task) -> tuple[Example, ...]:
    if not isinstance(task, MappingTask):
        raise ValueError(
            f"task {task.name!r} is a {type(task).__name__}, without a list of pairs to reverse; "
            "give one that mapping_task makes"
        )
    return task.pairs
