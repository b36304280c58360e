"""Mapping tasks: word pairs from the lists in this package."""

from __future__ import annotations

from collections.abc import Mapping

from transformer_lens_taskvec.tasks._data import read_pairs
from transformer_lens_taskvec.tasks.base import Task, by_name, mapping_task

# The name of a table of pairs, and the name of the reverse task if there is one.
_LINGUISTIC = {
    "antonyms": None,
    "singular_plural": "plural_singular",
    "present_past": "past_present",
    "present_gerund": "gerund_present",
    "adjective_comparative": None,
    "adjective_superlative": None,
    "adjective_adverb": None,
}
_KNOWLEDGE = {
    "country_capital": "capital_country",
    "country_continent": None,
    "landmark_country": None,
    "element_symbol": None,
}
_TRANSLATION = {"en_fr": "fr_en", "en_es": "es_en", "en_de": "de_en"}


def _names(table: Mapping[str, str | None]) -> tuple[str, ...]:
    return tuple(name for both in table.items() for name in both if name is not None)


LINGUISTIC = _names(_LINGUISTIC)
"""The names of the tasks of :func:`linguistic_tasks`."""
KNOWLEDGE = _names(_KNOWLEDGE)
"""The names of the tasks of :func:`knowledge_tasks`."""
TRANSLATION = _names(_TRANSLATION)
"""The names of the tasks of :func:`translation_tasks`."""


def linguistic_tasks() -> dict[str, Task]:
    """Return the tasks about English word forms and antonyms.

    No word occurs twice among the antonyms, in either column, so a demonstration never gives away
    the answer to a query.

    Returns:
        ``antonyms``, ``singular_plural``, ``plural_singular``, ``present_past``,
        ``past_present``, ``present_gerund``, ``gerund_present``, ``adjective_comparative``,
        ``adjective_superlative`` and ``adjective_adverb``, with about 150 to 280 pairs each.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> task = tv.tasks.linguistic_tasks()["past_present"]
        >>> [example.y for example in task.pairs if example.x in ("went", "walked")]
        ['go', 'walk']
    """
    return _tasks(_LINGUISTIC)


def knowledge_tasks() -> dict[str, Task]:
    """Return the tasks about facts of the world.

    Each input has one answer: ``country_capital`` leaves out countries without one undisputed
    capital, and ``country_continent`` those that lie on two continents or are named after theirs.

    Returns:
        ``country_capital``, ``capital_country``, ``country_continent``, ``landmark_country``
        and ``element_symbol``, with about 120 to 190 pairs each.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> task = tv.tasks.knowledge_tasks()["country_capital"]
        >>> [example.y for example in task.pairs if example.x == "Japan"]
        ['Tokyo']
    """
    return _tasks(_KNOWLEDGE)


def translation_tasks() -> dict[str, Task]:
    """Return the tasks of translating single words.

    Nouns have no article, German ones are capitalised, verbs are in the infinitive, and adjectives
    in the masculine singular. Words spelled the same in both languages are left out, since copying
    the input would answer them.

    Returns:
        ``en_fr``, ``fr_en``, ``en_es``, ``es_en``, ``en_de`` and ``de_en``, with about 240 to
        290 pairs each.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> task = tv.tasks.translation_tasks()["en_fr"]
        >>> [example.y for example in task.pairs if example.x in ("cheese", "sing")]
        ['fromage', 'chanter']
    """
    return _tasks(_TRANSLATION)


def _tasks(table: Mapping[str, str | None]) -> dict[str, Task]:
    tasks: list[Task] = []
    for forward, reverse in table.items():
        pairs = read_pairs(forward)
        tasks.append(mapping_task(forward, pairs))
        if reverse is not None:
            tasks.append(mapping_task(reverse, [(y, x) for x, y in pairs]))
    return by_name(tasks)
