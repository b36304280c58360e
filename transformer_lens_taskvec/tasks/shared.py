"""Tasks on the inputs that they have in common."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sized

from transformer_lens_taskvec.tasks.base import MappingTask, Task, mapping_task


def with_same_inputs(
    tasks: Mapping[str, Task] | Iterable[Task], *, n: int | None = None, seed: int = 0
) -> dict[str, MappingTask]:
    """Return the tasks on the inputs that all of them have, so that inputs do not tell the task.

    ``sample_episodes`` with as many episodes as there are inputs asks each task all of them.

    Args:
        tasks: Tasks with a limited number of inputs.
        n: The number of inputs, drawn at random; None for all.
        seed: Seed of the drawing, and of the answers of a task whose answers are random.

    Raises:
        ValueError: If a task's inputs are not limited, or the tasks share fewer than ``n`` inputs,
            or none.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> tasks = tv.find_tasks(["upper_case", "singular_plural"])
        >>> chosen = with_same_inputs(tasks, n=10)
        >>> [pair.x for pair in chosen["upper_case"].pairs] == [
        ...     pair.x for pair in chosen["singular_plural"].pairs
        ... ]
        True
    """
    listed = list(tasks.values()) if isinstance(tasks, Mapping) else list(tasks)
    pairs = []
    for task in listed:
        size = len(task) if isinstance(task, Sized) else None
        if size is None:
            raise ValueError(
                f"task {task.name!r} does not say how many inputs it has; give tasks with __len__"
            )
        drawn = task.sample(size, random.Random(seed))
        pairs.append({example.x: example.y for example in drawn})
    shared = [x for x in sorted(pairs[0]) if all(x in own for own in pairs)] if pairs else []
    if not shared or (n is not None and not 1 <= n <= len(shared)):
        names = ", ".join(task.name for task in listed)
        raise ValueError(
            f"n is {n} and the tasks {names or 'given'} share {len(shared)} inputs; use a number "
            "from 1 to that, or tasks that share more"
        )
    chosen = shared if n is None else sorted(random.Random(seed).sample(shared, n))
    made = [
        mapping_task(task.name, {x: own[x] for x in chosen})
        for task, own in zip(listed, pairs, strict=True)
    ]
    return {task.name: task for task in made}
