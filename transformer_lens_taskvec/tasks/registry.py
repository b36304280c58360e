"""The families of tasks in the package, one entry each, and finding tasks by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from transformer_lens_taskvec.tasks.algorithmic import ALGORITHMIC, algorithmic_tasks
from transformer_lens_taskvec.tasks.base import NULL, Task
from transformer_lens_taskvec.tasks.bijections import bijection_task
from transformer_lens_taskvec.tasks.bitwise import BITWISE, bitwise_tasks
from transformer_lens_taskvec.tasks.code import CODE, code_tasks
from transformer_lens_taskvec.tasks.mappings import (
    KNOWLEDGE,
    LINGUISTIC,
    TRANSLATION,
    knowledge_tasks,
    linguistic_tasks,
    translation_tasks,
)
from transformer_lens_taskvec.tasks.pos import POS_TAGS, pos_tasks

__all__ = ["FAMILIES", "NULL", "Family", "all_tasks", "find_tasks"]


@dataclass(frozen=True)
class Family:
    """Tasks that are made together.

    Attributes:
        name: The family's name.
        maker: Returns the tasks by name; it may return others too, such as Null.
        tasks: The names of the family's tasks, known before they are made.
        description: What the tasks have in common, in a few words.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> family = tv.tasks.FAMILIES[0]
        >>> family.name, family.tasks[:3]
        ('linguistic', ('antonyms', 'singular_plural', 'plural_singular'))
    """

    name: str
    maker: Callable[[], dict[str, Task]]
    tasks: tuple[str, ...]
    description: str

    def make(self) -> dict[str, Task]:
        """Return the family's tasks by name, in the order of :attr:`tasks`."""
        made = self.maker()
        return {name: made[name] for name in self.tasks}


FAMILIES = (
    Family("linguistic", linguistic_tasks, LINGUISTIC, "English word forms and antonyms"),
    Family("knowledge", knowledge_tasks, KNOWLEDGE, "countries, landmarks and elements"),
    Family("translation", translation_tasks, TRANSLATION, "words in English and other languages"),
    Family("algorithmic", algorithmic_tasks, ALGORITHMIC, "rules on letters, numbers and lists"),
    Family("code", code_tasks, CODE, "identifiers, number bases, operators and languages"),
    Family("bitwise", bitwise_tasks, BITWISE, "logical operations on two binary numbers"),
    Family("pos", pos_tasks, tuple(POS_TAGS), "the first word of one part of speech"),
)
"""The families of tasks, in the order in which ``taskvec tasks`` lists them."""


def all_tasks() -> dict[str, Task]:
    """Return the tasks of all :data:`FAMILIES` by name, without the Null ones.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> tasks = tv.tasks.all_tasks()
        >>> tasks["antonyms"]
        MappingTask('antonyms', 201 pairs: 'able' -> 'unable', 'above' -> 'below', ...)
        >>> [name for name in tasks if name.startswith("en_")]
        ['en_fr', 'en_es', 'en_de']
    """
    return {name: task for family in FAMILIES for name, task in family.make().items()}


def find_tasks(names: Iterable[str]) -> dict[str, Task]:
    """Return tasks by name; only the families that they belong to are made.

    Args:
        names: Names of tasks; ``taskvec tasks`` lists them. Two that undo each other, with a plus
            between them, are a task in both directions, :func:`bijection_task`.

    Returns:
        The tasks by name, in the given order.

    Raises:
        ValueError: If there are no names or one is unknown; the message suggests similar ones.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> tv.find_tasks(["country_capital"])["country_capital"].pairs[0].y
        'Kabul'
        >>> tv.find_tasks(["en_fr+fr_en"])["en_fr+fr_en"].name
        'en_fr+fr_en'
        >>> tv.find_tasks(["antonym"])
        Traceback (most recent call last):
        ValueError: no task named 'antonym'; did you mean antonyms? `taskvec tasks` lists them all
    """
    asked = list(names)
    wanted = [part for name in asked for part in name.split("+")]
    if not wanted:
        raise ValueError("no task named; give at least one. `taskvec tasks` lists them all")
    family_of = {task: family for family in FAMILIES for task in family.tasks}
    for name in wanted:
        if name not in family_of:
            near = get_close_matches(name, family_of, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ";"
            raise ValueError(f"no task named {name!r}{hint} `taskvec tasks` lists them all")
    made: dict[str, Task] = {}
    for family in dict.fromkeys(family_of[name] for name in wanted):
        made |= family.make()
    found = {}
    for name in asked:
        first, *others = name.split("+")
        if len(others) > 1:
            raise ValueError(f"{name!r} joins {1 + len(others)} tasks; a bijection joins two")
        found[name] = bijection_task(made[first], made[others[0]]) if others else made[first]
    return found
