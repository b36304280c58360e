"""Algorithmic tasks: a rule on the characters of a word, on a letter, a number or a list."""

from __future__ import annotations

import math
import random
import string
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

from transformer_lens_taskvec.tasks._data import read_text
from transformer_lens_taskvec.tasks.base import (
    Example,
    Task,
    by_name,
    check_sample_size,
    mapping_task,
)

_MAX_NUMBER = 200
_SEPARATOR = ", "


@dataclass(frozen=True, repr=False)
class ListTask:
    """The task of picking one item of a comma-separated list of distinct words.

    The length of each list is drawn first, all lengths being equally likely, and then its words.

    Args:
        name: The task's name in results.
        item: The index of the answer in the list: 0 for the first word, -1 for the last.
        words: The distinct words that lists are made of.
        min_length: The fewest words in a list.
        max_length: The most words in a list.

    Raises:
        ValueError: If the lengths are out of order or range, ``item`` is outside the shortest
            list, or a word is empty, repeated or contains a comma.

    Example:
        >>> import random
        >>> from transformer_lens_taskvec.tasks.algorithmic import ListTask
        >>> task = ListTask("list_last", -1, ("cat", "sun"), min_length=2, max_length=2)
        >>> sorted((e.x, e.y) for e in task.sample(2, random.Random(0)))
        [('cat, sun', 'sun'), ('sun, cat', 'cat')]
    """

    name: str
    item: int
    words: tuple[str, ...]
    min_length: int = 3
    max_length: int = 5

    def __post_init__(self) -> None:
        if not 1 <= self.min_length <= self.max_length <= len(self.words):
            raise ValueError(
                f"{len(self.words)} words cannot make lists of {self.min_length} to "
                f"{self.max_length} distinct words; "
                f"use 1 <= min_length <= max_length <= {len(self.words)}"
            )
        if not -self.min_length <= self.item < self.min_length:
            raise ValueError(
                f"item={self.item} is outside a list of {self.min_length} words; "
                f"use {-self.min_length} to {self.min_length - 1}"
            )
        if len(set(self.words)) < len(self.words):
            raise ValueError(
                f"the words of task {self.name!r} must be distinct; remove the duplicates"
            )
        for word in self.words:
            if not word.strip() or "," in word:
                raise ValueError(
                    f"a list cannot contain the word {word!r}; "
                    "words must be non-empty and contain no commas"
                )

    def __len__(self) -> int:
        n_lists = sum(
            math.perm(len(self.words), length)
            for length in range(self.min_length, self.max_length + 1)
        )
        # len() raises an error above sys.maxsize.
        return min(n_lists, sys.maxsize)

    def __repr__(self) -> str:
        return (
            f"ListTask({self.name!r}, item={self.item}, lists of {self.min_length} to "
            f"{self.max_length} of {len(self.words)} words)"
        )

    def sample(self, n: int, rng: random.Random) -> list[Example]:
        """Return ``n`` distinct random lists, each with its answer.

        Raises:
            ValueError: If ``n`` is negative or more than the number of lists.
        """
        check_sample_size(self.name, n, len(self))
        examples: dict[str, Example] = {}
        while len(examples) < n:
            words = rng.sample(self.words, rng.randint(self.min_length, self.max_length))
            x = _SEPARATOR.join(words)
            examples.setdefault(x, Example(x, words[self.item]))
        return list(examples.values())


_PAIRS: dict[str, Callable[[tuple[str, ...]], Iterable[tuple[str, str]]]] = {
    "upper_case": lambda words: ((word, word.upper()) for word in words),
    "lower_case": lambda words: ((word.upper(), word) for word in words),
    "capitalize": lambda words: ((word, word.capitalize()) for word in words),
    "first_letter": lambda words: ((word, word[0]) for word in words),
    "last_letter": lambda words: ((word, word[-1]) for word in words),
    "next_letter": lambda _: pairwise(string.ascii_lowercase),
    "previous_letter": lambda _: pairwise(reversed(string.ascii_lowercase)),
    "next_number": lambda _: ((str(n), str(n + 1)) for n in range(_MAX_NUMBER + 1)),
}
_ITEMS = {"list_first": 0, "list_last": -1}
ALGORITHMIC = (*_PAIRS, *_ITEMS)
"""The names of the tasks of :func:`algorithmic_tasks`."""


def algorithmic_tasks() -> dict[str, Task]:
    """Return the tasks whose answer follows from the input by a rule.

    The words are 315 common lower-case English words of up to five letters.

    Returns:
        ``upper_case``, ``lower_case``, ``capitalize``, ``first_letter`` and ``last_letter`` of a
        word; ``next_letter`` (of a to y) and ``previous_letter`` (of b to z); ``next_number``
        (of 0 to 200); ``list_first`` and ``list_last`` of three to five words.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> tasks = tv.tasks.algorithmic_tasks()
        >>> tasks["next_letter"].pairs[0]
        Example(x='a', y='b')
        >>> tasks["list_first"]
        ListTask('list_first', item=0, lists of 3 to 5 of 315 words)
    """
    words = tuple(read_text("words.txt").split())
    return by_name(
        [
            *(mapping_task(name, pairs(words)) for name, pairs in _PAIRS.items()),
            *(ListTask(name, item, words) for name, item in _ITEMS.items()),
        ]
    )
