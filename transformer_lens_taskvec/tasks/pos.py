"""Part-of-speech tasks: the first noun, adjective, verb, ... of a sentence."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from transformer_lens_taskvec.tasks.base import NULL, Example, Task, by_name, check_sample_size
from transformer_lens_taskvec.tasks.sentences import Sentence, generate_sentences

POS_TAGS: Mapping[str, str] = MappingProxyType(
    {
        "Noun": "NOUN",
        "Adjective": "ADJ",
        "Verb": "VERB",
        "Adverb": "ADV",
        "Preposition": "ADP",
        "Pronoun": "PRON",
    }
)
_NOT_WORDS = frozenset(["PUNCT", "SYM"])
_WORD_CHARACTER = re.compile(r"\w")


@dataclass(frozen=True, repr=False)
class PosTask:
    """The task of finding the first word of one part of speech; made by :func:`pos_tasks`.

    Args:
        name: The task's name in results.
        tag: The UPOS tag of the answer, or None for a randomly chosen word.
        sentences: Sentences with distinct texts, each of which contains an answer.
    """

    name: str
    tag: str | None
    sentences: tuple[Sentence, ...]

    def __len__(self) -> int:
        return len(self.sentences)

    def __repr__(self) -> str:
        return f"PosTask({self.name!r}, tag={self.tag!r}, {len(self)} sentences)"

    def sample(self, n: int, rng: random.Random) -> list[Example]:
        """Return ``n`` sentences, drawn without replacement, each with its answer.

        Raises:
            ValueError: If ``n`` is negative or more than the number of sentences, or a sentence
                has no answer.
        """
        check_sample_size(self.name, n, len(self))
        return [
            Example(sentence.text, self._answer(sentence, rng))
            for sentence in rng.sample(self.sentences, n)
        ]

    def _answer(self, sentence: Sentence, rng: random.Random) -> str:
        if self.tag is None:
            return rng.choice(_candidates(sentence))
        answer = sentence.first(self.tag)
        if answer is None:
            raise ValueError(
                f"task {self.name!r} needs a word tagged {self.tag} and there is none in "
                f"{sentence.text!r}; make the task with pos_tasks, which leaves such sentences out"
            )
        return answer


def pos_tasks(sentences: Iterable[Sentence] | None = None, null: bool = True) -> dict[str, Task]:
    """Return the part-of-speech tasks (Han et al. 2025, §4): the first word of one kind.

    All tasks use the same sentences: those with all six parts of speech, each text once. A sentence
    is also left out if one of its answers is not a separate word in the text, like "gon" in "I'm
    gonna go". An answer is spelled as in the sentence.

    Args:
        sentences: Tagged sentences, for example from :func:`load_conllu`; by default 6,000
            generated ones.
        null: Whether to add Null, the task whose answer is a random word.

    Returns:
        The tasks Noun, Adjective, Verb, Adverb, Preposition, Pronoun and Null by name.

    Raises:
        ValueError: If no sentence has all six parts of speech.

    Example:
        >>> import random
        >>> import transformer_lens_taskvec as tv
        >>> from transformer_lens_taskvec.tasks import Sentence
        >>> words = ("Slowly", ",", "they", "walked", "toward", "a", "small", "village", ".")
        >>> tags = ("ADV", "PUNCT", "PRON", "VERB", "ADP", "DET", "ADJ", "NOUN", "PUNCT")
        >>> tasks = tv.pos_tasks([Sentence(words, tags)])
        >>> tasks["Adverb"].sample(1, random.Random(0))
        [Example(x='Slowly, they walked toward a small village.', y='Slowly')]
    """
    pool = _usable(sentences)
    tasks = [PosTask(name, tag, pool) for name, tag in POS_TAGS.items()]
    return by_name([*tasks, PosTask(NULL, None, pool)] if null else tasks)


def _usable(sentences: Iterable[Sentence] | None) -> tuple[Sentence, ...]:
    """Return the sentences in which every task has an answer, each text once."""
    given = tuple(generate_sentences() if sentences is None else sentences)
    usable: dict[str, Sentence] = {}
    for sentence in given:
        if _is_usable(sentence):
            usable.setdefault(sentence.text, sentence)
    if not usable:
        raise ValueError(
            f"none of the {len(given)} sentences given has all six parts of speech "
            f"({', '.join(POS_TAGS.values())}); check that their tags are UPOS tags"
        )
    return tuple(usable.values())


def _is_usable(sentence: Sentence) -> bool:
    answers = [sentence.first(tag) for tag in POS_TAGS.values()]
    return all(word is not None and _stands_alone(word, sentence.text) for word in answers)


def _candidates(sentence: Sentence) -> list[str]:
    return [
        word
        for word, tag in zip(sentence.words, sentence.tags, strict=True)
        if tag not in _NOT_WORDS and _stands_alone(word, sentence.text)
    ]


def _stands_alone(word: str, text: str) -> bool:
    """Return whether the word occurs with no letter, digit or underscore on either side."""
    start = text.find(word)
    while start >= 0:
        around = text[max(start - 1, 0) : start] + text[start + len(word) :][:1]
        if not _WORD_CHARACTER.search(around):
            return True
        start = text.find(word, start + 1)
    return False


def split_pos_tasks(
    sentences: Sequence[Sentence] | None = None, *, test_share: float = 0.2, seed: int = 0
) -> tuple[dict[str, Task], dict[str, Task]]:
    """Return part-of-speech tasks on disjoint train and test sentences (Han et al. 2025, App. G).

    Args:
        sentences: Tagged sentences; by default 6,000 generated ones.
        test_share: The share of the sentences in the test tasks, 0.2 in the paper.
        seed: Seed of the split.

    Returns:
        The train tasks and the test tasks, by name, Null last.

    Raises:
        ValueError: If ``test_share`` is not between 0 and 1, or either part has no usable sentence.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> train, test = tv.tasks.split_pos_tasks()
        >>> list(train)
        ['Noun', 'Adjective', 'Verb', 'Adverb', 'Preposition', 'Pronoun', 'Null']
        >>> set(train["Noun"].sentences) & set(test["Noun"].sentences)
        set()
    """
    if not 0 < test_share < 1:
        raise ValueError(f"test_share is {test_share}; it must be between 0 and 1")
    pool = list(_usable(sentences))
    random.Random(seed).shuffle(pool)
    n_test = round(test_share * len(pool))
    return pos_tasks(pool[n_test:]), pos_tasks(pool[:n_test])
