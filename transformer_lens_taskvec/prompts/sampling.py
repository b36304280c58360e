"""Random episodes of tasks, and sets of them that share no query."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterable, Mapping, Sequence, Sized

from transformer_lens_taskvec._utils.text import stable_hash
from transformer_lens_taskvec.prompts.episodes import Episode
from transformer_lens_taskvec.prompts.templates import EXAMPLE_ARROW, PromptTemplate
from transformer_lens_taskvec.tasks.base import Example, Task

FEWEST_SETS = 8
"""The fewest sets of demonstrations whose variance can be told; with fewer, sampling warns."""

_TRIES = 100
"""Draws per set of demonstrations until it differs from every other."""


def sample_episodes(
    tasks: Mapping[str, Task] | Iterable[Task],
    n: int,
    n_shots: int,
    seed: int,
    *,
    template: PromptTemplate = EXAMPLE_ARROW,
    demo_sets: int | None = None,
) -> list[Episode]:
    """Return ``n`` random episodes per task; a query is never among its own demonstrations.

    Queries of one task are distinct as long as the task has enough inputs, and then repeat with
    other demonstrations, which a warning says. Each task has its own random stream, so adding a
    task does not change the episodes of the others.

    With ``demo_sets`` the episodes of each task share that many sets of demonstrations: prompts of
    one set begin with the same text, which then runs once for all its queries. The queries are the
    same as without, and are dealt out to the sets in turn, so that sets differ in size by at most
    one. A set's demonstrations are drawn from the inputs that are not asked after it. Since its
    queries are themselves a random choice, each query's demonstrations are, as always, a random
    choice of all other inputs: accuracies have no bias. But answers after the same demonstrations
    are right or wrong together, and intervals allow for it. Use this for accuracies. For vectors
    and decodability keep fresh demonstrations.

    Args:
        tasks: Tasks, or a mapping from names to tasks as the task functions return it.
        n: Episodes per task.
        n_shots: Demonstrations per episode.
        seed: Seed of the sampling.
        template: The template of the prompts.
        demo_sets: Sets of demonstrations per task, all different; None draws fresh demonstrations
            for every episode.

    Returns:
        The episodes, task by task.

    Raises:
        ValueError: If there is no task, two have the same name, a number is out of range, or a task
            has too few inputs for ``n_shots`` demonstrations and a query, or repeats inputs. With
            ``demo_sets``, if there are fewer episodes than sets, nothing to share
            (``n_shots=0``), or too few inputs for so many different sets apart from their queries.
        TypeError: If one of the tasks is not a task.

    Warns:
        UserWarning: If more episodes are asked for than a task has inputs, or fewer than 8 sets.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> plural = tv.mapping_task("plural", {"cat": "cats", "dog": "dogs", "cow": "cows"})
        >>> episodes = tv.sample_episodes([plural], n=3, n_shots=2, seed=0)
        >>> sorted(episode.query.x for episode in episodes)
        ['cat', 'cow', 'dog']
        >>> upper = tv.find_tasks(["upper_case"])
        >>> shared = tv.sample_episodes(upper, n=40, n_shots=5, seed=0, demo_sets=10)
        >>> len({episode.demos for episode in shared}), len({e.demo_set for e in shared})
        (10, 10)
    """
    return sample_splits(tasks, {"all": n}, n_shots, seed, template=template, demo_sets=demo_sets)[
        "all"
    ]


def sample_splits(
    tasks: Mapping[str, Task] | Iterable[Task],
    sizes: Mapping[str, int],
    n_shots: int,
    seed: int,
    *,
    template: PromptTemplate = EXAMPLE_ARROW,
    demo_sets: int | Mapping[str, int | None] | None = None,
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
        demo_sets: As for :func:`sample_episodes`, for every set of episodes, or a mapping from the
            names of some: ``{"test": 20}`` leaves the others their fresh demonstrations.

    Returns:
        The episodes of each set, task by task.

    Raises:
        ValueError: As for :func:`sample_episodes`, or if a task has fewer inputs than sets, or
            ``demo_sets`` names a set that is not in ``sizes``.
        TypeError: As for :func:`sample_episodes`.

    Warns:
        UserWarning: If the sets together ask for more episodes than a task has inputs, or for fewer
            than 8 sets of demonstrations.

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
    shared = _checked_sets(demo_sets, sizes, n_shots)
    for task in chosen:
        _check_task(task, n_sets=sum(size > 0 for size in sizes.values()), n_shots=n_shots)
    _warn_of_repeats(chosen, sum(sizes.values()))
    episodes: dict[str, list[Episode]] = {name: [] for name in sizes}
    for task in chosen:
        rng = random.Random(f"{seed}/{task.name}")
        queries = _share_out(task, sizes, rng)
        for name, size in sizes.items():
            asked = [queries[name][index % len(queries[name])] for index in range(size)]
            after: list[tuple[tuple[Example, ...], int | None]]
            if name in shared:
                own = random.Random(f"{seed}/{task.name}/{name}")  # other sets stay as they are
                places = _deal(size, len(queries[name]), shared[name])
                sets = _demo_sets(task, asked, places, n_shots, own)
                after = [sets[place] for place in places]
            else:
                after = [(_demonstrations(task, [query], n_shots, rng), None) for query in asked]
            episodes[name] += [
                Episode(task.name, demos, query, template, seed, demo_set)
                for query, (demos, demo_set) in zip(asked, after, strict=True)
            ]
    return episodes


def _deal(size: int, n_queries: int, n_sets: int) -> list[int]:
    """Return each episode's set of demonstrations, dealt out in turn.

    Queries that repeat meet every set before they meet one again.
    """
    whole = math.lcm(n_queries, n_sets)
    return [(index + index // whole) % n_sets for index in range(size)]


def _demo_sets(
    task: Task, asked: Sequence[Example], places: Sequence[int], n_shots: int, rng: random.Random
) -> list[tuple[tuple[Example, ...], int | None]]:
    """Return different sets of demonstrations, none with a query asked after it, and their ids."""
    found: dict[tuple[Example, ...], int | None] = {}
    n_sets, available = max(places) + 1, _n_inputs(task)
    for place in range(n_sets):
        rows = [query for query, at in zip(asked, places, strict=True) if at == place]
        own = list(dict.fromkeys(rows))
        if available is not None and available < n_shots + len(own):
            raise ValueError(
                f"task {task.name!r} has {available} distinct inputs, too few for n_shots={n_shots}"
                f" demonstrations apart from the {len(own)} queries asked after them. Use more than"
                f" {n_sets} demo_sets, fewer shots, or fresh demonstrations (demo_sets=None)"
            )
        tries = (_demonstrations(task, own, n_shots, rng) for _ in range(_TRIES * n_sets))
        demos = next((demos for demos in tries if demos not in found), None)
        if demos is None:
            raise ValueError(
                f"task {task.name!r} gives {place} different sets of {n_shots} demonstration(s) "
                f"apart from their queries, not demo_sets={n_sets}. Use fewer sets, more shots, or "
                "fresh demonstrations (demo_sets=None)"
            )
        found[demos] = stable_hash(
            task.name, *(part for demo in demos for part in (demo.x, demo.y))
        )
    return list(found.items())


def _demonstrations(
    task: Task, queries: Sequence[Example], n_shots: int, rng: random.Random
) -> tuple[Example, ...]:
    """Return random examples with other inputs than the queries have."""
    drawn, taken = _distinct(task, n_shots + len(queries), rng), {query.x for query in queries}
    return tuple([example for example in drawn if example.x not in taken][:n_shots])


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


def _checked_sets(
    demo_sets: int | Mapping[str, int | None] | None, sizes: Mapping[str, int], n_shots: int
) -> dict[str, int]:
    """Return the number of sets of demonstrations for the names that share some."""
    given = demo_sets if isinstance(demo_sets, Mapping) else dict.fromkeys(sizes, demo_sets)
    if unknown := sorted(set(given) - set(sizes)):
        raise ValueError(f"demo_sets names {unknown}; the sets of episodes are {list(sizes)}")
    shared = {name: count for name, count in given.items() if count is not None}
    for name, count in shared.items():
        if not 1 <= count <= sizes[name]:
            raise ValueError(
                f"demo_sets is {count} for {sizes[name]} episodes per task; it must be 1 to "
                f"{sizes[name]}, or None for fresh demonstrations"
            )
    if shared and not n_shots:
        raise ValueError(
            f"demo_sets is {demo_sets} and n_shots is 0, so there are no demonstrations to share; "
            "use demo_sets=None"
        )
    if shared and min(shared.values()) < FEWEST_SETS:
        warnings.warn(
            f"demo_sets is {min(shared.values())}. The variance between so few sets is hardly "
            f"known, and intervals are wide: use {FEWEST_SETS} or more, except to measure speed.",
            stacklevel=3,
        )
    return shared


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
