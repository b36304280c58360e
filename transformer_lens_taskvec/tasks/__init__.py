"""Tasks: those that come with the package, makers of new ones, and loaders of public formats."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from transformer_lens_taskvec.tasks.algorithmic import algorithmic_tasks
from transformer_lens_taskvec.tasks.base import Example, MappingTask, Task, mapping_task
from transformer_lens_taskvec.tasks.bitwise import bitwise_tasks
from transformer_lens_taskvec.tasks.conllu import load_conllu
from transformer_lens_taskvec.tasks.mappings import (
    knowledge_tasks,
    linguistic_tasks,
    load_mapping,
    translation_tasks,
)
from transformer_lens_taskvec.tasks.pos import pos_tasks, split_pos_tasks
from transformer_lens_taskvec.tasks.sentences import Sentence, generate_sentences
from transformer_lens_taskvec.tasks.treebank import load_treebank

__all__ = [
    "Example",
    "MappingTask",
    "Sentence",
    "Task",
    "algorithmic_tasks",
    "all_tasks",
    "bitwise_tasks",
    "find_tasks",
    "generate_sentences",
    "knowledge_tasks",
    "linguistic_tasks",
    "load_conllu",
    "load_mapping",
    "load_treebank",
    "mapping_task",
    "pos_tasks",
    "split_pos_tasks",
    "translation_tasks",
]


def all_tasks() -> dict[str, Task]:
    """Every task that comes with the package, by name; the Null classes are left out.

    Returns:
        What :func:`linguistic_tasks`, :func:`knowledge_tasks`, :func:`translation_tasks`,
        :func:`algorithmic_tasks`, :func:`bitwise_tasks` and :func:`pos_tasks` make, in this order.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> tasks = tv.tasks.all_tasks()
        >>> tasks["antonyms"]
        MappingTask('antonyms', 201 pairs: 'able' -> 'unable', 'above' -> 'below', ...)
        >>> [name for name in tasks if name.startswith("en_")]
        ['en_fr', 'en_es', 'en_de']
    """
    return {
        **linguistic_tasks(),
        **knowledge_tasks(),
        **translation_tasks(),
        **algorithmic_tasks(),
        **bitwise_tasks(null=False),
        **pos_tasks(null=False),
    }


def find_tasks(names: Iterable[str]) -> dict[str, Task]:
    """Tasks of the package by their names.

    Args:
        names: As :func:`all_tasks` has them.

    Returns:
        The tasks by name, in the order asked for.

    Raises:
        ValueError: If there is no name, or none of the tasks has it; the message suggests one.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> tv.find_tasks(["country_capital"])["country_capital"].pairs[0].y
        'Kabul'
        >>> tv.find_tasks(["antonym"])
        Traceback (most recent call last):
        ValueError: no task named 'antonym'; did you mean antonyms? `taskvec tasks` lists them all
    """
    tasks = all_tasks()
    chosen = {}
    for name in names:
        if name not in tasks:
            near = get_close_matches(name, tasks, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"no task named {name!r}{hint} `taskvec tasks` lists them all")
        chosen[name] = tasks[name]
    if not chosen:
        raise ValueError("no task named; give at least one, `taskvec tasks` lists them")
    return chosen
