"""Random episodes of tasks, and sets of them that share no query."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Mapping, Sequence, Sized

from transformer_lens_taskvec.prompts.episodes import Episode
from transformer_lens_taskvec.prompts.templates import EXAMPLE_ARROW, PromptTemplate
from transformer_lens_taskvec.tasks.base import Example, Task


def sample_episodes(
    tasks: Mapping[str, Task] | Iterable[Task],
    n: int,
    n_shots: int,
    seed: int,
    *,
    template: PromptTemplate = EXAMPLE_ARROW,
) -> list[Episode]:
    """Return ``n`` random episodes per task; a query is never among its own demonstrations.

    Queries of one task are distinct as long as the task has enough inputs, and then repeat with
    other demonstrations, which a warning says. Each task has its own random stream, so adding a
    task does not change the episodes of the others.

    Args:
        tasks: Tasks, or a mapping from names to tasks as the task functions return it.
        n: Episodes per task.
        n_shots: Demonstrations per episode.
        seed: Seed of the sampling.
        template: The template of the prompts.

    Returns:
        The episodes, task by task.

    Raises:
        ValueError: If there is no task, two have the same name, a number is out of range, or a task
            has too few inputs for ``n_shots`` demonstrations and a query, or repeats inputs.
        TypeError: If one of the tasks is not a task.

    Warns:
        UserWarning: If more episodes are asked for than a task has inputs.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> plural = tv.mapping_task("plural", {"cat": "cats", "dog": "dogs", "cow": "cows"})
        >>> episodes = tv.sample_episodes([plural], n=3, n_shots=2, seed=0)
        >>> sorted(episode.query.x for episode in episodes)
        ['cat', 'cow', 'dog']
    """
    return sample_splits(tasks, {"all": n}, n_shots, seed, template=template)["all"]


def sample_splits(
    tasks: Mapping[str, Task] | Iterable[Task],
    sizes: Mapping[str, int],
    n_shots: int,
    seed: int,
    *,
    template: PromptTemplate = EXAMPLE_ARROW,
) -> dict[str, list[Episode]]:
    """Return sets of random episodes such that no two sets share a query.

    Vectors from the evaluated episodes themselves would leak the answers; take them from another
    set. If a task has fewer inputs than the sets together ask for, they are divided in proportion
    to the sizes, and queries repeat within a set with other demonstrations.

    Args:
        tasks: As for :func:`sample_episodes`.
        sizes: Episodes per task in each set, such as ``{"train": 40, "test": 40}``.
        n_shots: As for :func:`sample_episodes`.
        seed: As for :func:`sample_episodes`.
        template: As for :func:`sample_episodes`.

    Returns:
        The episodes of each set, task by task.

    Raises:
        ValueError: As for :func:`sample_episodes`, or if a task has fewer inputs than sets.
        TypeError: As for :func:`sample_episodes`.

    Warns:
        UserWarning: If the sets together ask for more episodes than a task has inputs.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> double = tv.mapping_task("double", {str(i): str(2 * i) for i in range(20)})
        >>> sets = tv.sample_splits([double], {"train": 5, "test": 5}, n_shots=2, seed=0)
        >>> len(sets["train"]), len(sets["test"])
        (5, 5)
        >>> {e.query for e in sets["train"]} & {e.query for e in sets["test"]}
        set()
    """
    chosen = list(tasks.values()) if isinstance(tasks, Mapping) else list(tasks)
    _check_request(chosen, sizes, n_shots)
    for task in chosen:
        _check_task(task, n_sets=sum(size > 0 for size in sizes.values()), n_shots=n_shots)
    _warn_of_repeats(chosen, sum(sizes.values()))
    episodes: dict[str, list[Episode]] = {name: [] for name in sizes}
    for task in chosen:
        rng = random.Random(f"{seed}/{task.name}")
        queries = _share_out(task, sizes, rng)
        for name, size in sizes.items():
            for index in range(size):
                query = queries[name][index % len(queries[name])]
                drawn = _distinct(task, n_shots + 1, rng)
                demos = [e for e in drawn if e.x != query.x][:n_shots]
                episodes[name].append(Episode(task.name, tuple(demos), query, template, seed))
    return episodes


def _n_inputs(task: Task) -> int | None:
    """Return the number of the task's distinct inputs, or None if it is not known."""
    return len(task) if isinstance(task, Sized) else None


def _check_request(tasks: Sequence[Task], sizes: Mapping[str, int], n_shots: int) -> None:
    if not tasks:
        raise ValueError("tasks is empty; give at least one task")
    for task in tasks:
        if not isinstance(task, Task):
            raise TypeError(f"{task!r} is not a task: it needs .name and .sample(n, rng)")
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"tasks must have distinct names, got {names}")
    if n_shots < 0:
        raise ValueError(f"n_shots is {n_shots}; it must be 0 or more")
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"n is {size} for the set {name!r}; it must be 1 or more")


def _warn_of_repeats(tasks: Sequence[Task], n: int) -> None:
    few = {task.name: _n_inputs(task) for task in tasks if n > (_n_inputs(task) or n)}
    if few:
        warnings.warn(
            f"{n} episodes of each task are asked for in all, but "
            + ", ".join(f"{name!r} has {available}" for name, available in few.items())
            + " distinct inputs. Queries repeat with other demonstrations; accuracies, intervals "
            "and tests count distinct queries.",
            stacklevel=3,
        )


def _check_task(task: Task, n_sets: int, n_shots: int) -> None:
    available = _n_inputs(task)
    if available is None:
        return
    if available < max(n_shots + 1, n_sets):
        raise ValueError(
            f"task {task.name!r} has {available} distinct inputs, too few for n_shots={n_shots} "
            f"demonstrations and a query in each of {n_sets} set(s); at most n_shots="
            f"{max(available - 1, 0)}"
        )


def _distinct(task: Task, n: int, rng: random.Random) -> list[Example]:
    """Return ``n`` examples of a task, or raise ``ValueError`` unless their inputs are distinct."""
    examples = task.sample(n, rng)
    found = len({example.x for example in examples})
    if not len(examples) == found == n:
        raise ValueError(
            f"task {task.name!r} was asked for {n} examples with distinct inputs and gave "
            f"{len(examples)} with {found} distinct inputs, so episodes would lack demonstrations "
            "and sets would share queries. Let sample(n, rng) draw without replacement, and give "
            "the number of inputs as __len__ if it is limited"
        )
    return examples


def _share_out(
    task: Task, sizes: Mapping[str, int], rng: random.Random
) -> dict[str, list[Example]]:
    """Return each set's queries: as many as asked for, or its share of all the task's inputs."""
    available = _n_inputs(task)
    wanted = sum(sizes.values())
    pool = _distinct(task, wanted if available is None else min(wanted, available), rng)
    ends, asked = [0], 0
    for size in sizes.values():
        asked += size
        least = ends[-1] + 1
        most = len(pool) - (len(sizes) - len(ends))
        ends.append(min(max(round(len(pool) * asked / wanted), least), most))
    return {name: pool[start:end] for name, start, end in zip(sizes, ends, ends[1:], strict=False)}
