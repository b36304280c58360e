"""Sentences with the part of speech of each word, and a generator of varied English ones."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from transformer_lens_taskvec.tasks import _grammar as grammar

_MAX_SENTENCES = 100_000
_MIN_WORDS, _MAX_WORDS = 8, 16

_NO_SPACE_BEFORE = re.compile(r"[.,;:!?%)\]}…]|\.\.\.|''|'[a-z]{0,2}|n't", re.IGNORECASE)
_NO_SPACE_AFTER = frozenset(["(", "[", "{", "$", "#", "``"])


@dataclass(frozen=True)
class Sentence:
    """A sentence as words, each with its universal part of speech (UPOS).

    Args:
        words: The words and punctuation marks in order.
        tags: The UPOS tag of each word.
        source_text: The sentence as printed in its source; without it :attr:`text` joins the words.

    Raises:
        ValueError: If there are no words, or not one tag per word.

    Example:
        >>> from transformer_lens_taskvec.tasks import Sentence
        >>> sentence = Sentence(("She", "sings", "."), ("PRON", "VERB", "PUNCT"))
        >>> sentence.text, sentence.first("VERB")
        ('She sings.', 'sings')
    """

    words: tuple[str, ...]
    tags: tuple[str, ...]
    source_text: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.words or len(self.words) != len(self.tags):
            raise ValueError(
                f"a sentence needs words and one tag per word, got {len(self.words)} words "
                f"and {len(self.tags)} tags"
            )

    @property
    def text(self) -> str:
        """The sentence as text, with no space before punctuation."""
        return detokenise(self.words) if self.source_text is None else self.source_text

    def first(self, tag: str) -> str | None:
        """Return the first word with this tag as the text spells it, or None if there is none."""
        return self.words[self.tags.index(tag)] if tag in self.tags else None


def detokenise(words: Iterable[str]) -> str:
    """Return words joined into text, with punctuation and contractions closed up.

    Args:
        words: Tokens in the style of the Penn Treebank.

    Returns:
        The text, with the treebank's ``` `` ``` and ``''`` quotes as ``"``.

    Example:
        >>> detokenise(["Well", ",", "she", "did", "n't", "(", "yet", ")", "."])
        "Well, she didn't (yet)."
    """
    text = ""
    glue = True
    for word in words:
        if not glue and not _NO_SPACE_BEFORE.fullmatch(word):
            text += " "
        text += '"' if word in ("``", "''") else word
        glue = word in _NO_SPACE_AFTER
    return text


@functools.lru_cache(maxsize=4)
def generate_sentences(n: int = 6000, seed: int = 0) -> tuple[Sentence, ...]:
    """Return distinct English sentences, each with all six of the tasks' parts of speech.

    A sentence is a template of :mod:`~transformer_lens_taskvec.tasks._grammar` filled with words
    that belong to one scene (a kitchen, an office, a farm), 8 to 16 words not counting punctuation.
    The order of the parts of speech varies with the template, so no position gives a task away, and
    no word form has two tags.

    Args:
        n: The number of sentences, 1 to 100,000.
        seed: Seed of the generator.

    Returns:
        The sentences, no two with the same text.

    Raises:
        ValueError: If ``n`` is out of range.

    Example:
        >>> from transformer_lens_taskvec.tasks import generate_sentences
        >>> sentence = generate_sentences(2, seed=0)[0]
        >>> {"NOUN", "ADJ", "VERB", "ADV", "ADP", "PRON"} <= set(sentence.tags)
        True
    """
    if not 1 <= n <= _MAX_SENTENCES:
        raise ValueError(f"n={n} sentences is out of range; ask for 1 to {_MAX_SENTENCES}")
    rng = random.Random(seed)
    sentences: dict[tuple[str, ...], Sentence] = {}
    while len(sentences) < n:
        words, tags = grammar.fill(rng)
        if _MIN_WORDS <= len(tags) - tags.count("PUNCT") <= _MAX_WORDS:
            sentences.setdefault(words, Sentence(words, tags, detokenise(words)))
    return tuple(sentences.values())
