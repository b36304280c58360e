"""The words of ``generate_sentences``, by meaning and part of speech.

Every word form has one part of speech in the whole vocabulary (so no noun "cook" alongside a verb
"cook"), and words on whose tag annotators disagree are left out: participles as adjectives,
"that", "there", subordinating conjunctions, compound nouns, verb particles. The words themselves,
and the templates they fill, are in ``data/sentences.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformer_lens_taskvec.tasks._data import read_text

Tagged = tuple[str, str]

_DATA: Mapping[str, Any] = json.loads(read_text("sentences.json"))
MASS_NOUNS = frozenset(_DATA["mass_nouns"].split())
GENDER: Mapping[str, str] = _DATA["gender"]
NAMES = {pronoun: tuple(names.split()) for pronoun, names in _DATA["names"].items()}
CONSONANT_SOUND = frozenset(_DATA["consonant_sound"].split())
VOWEL_SOUND = frozenset(_DATA["vowel_sound"].split())


@dataclass(frozen=True)
class Verb:
    """The forms of a verb."""

    base: str
    third: str
    past: str
    ing: str


@dataclass(frozen=True)
class Scene:
    """Words that go together: who does what to what, where and how."""

    agents: tuple[str, ...]
    verbs: tuple[Verb, ...]
    objects: tuple[str, ...]
    qualities: tuple[str, ...]
    places: tuple[tuple[str, str], ...]
    manners: tuple[str, ...]
    objects_are_people: bool = False
    objects_have_owners: bool = True


def plural(noun: str) -> str:
    """Return the plural of a noun in the vocabulary."""
    return _DATA["irregular_plurals"].get(noun) or _with_s(noun)


def _with_s(word: str) -> str:
    if word.endswith(("s", "sh", "ch", "x", "z", "to")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


def _verb(entry: str) -> Verb:
    """Read "base", "base:past" or "base:past:ing"; the other forms follow the rules."""
    base, past, ing, *_ = (*entry.split(":"), "", "")
    if not past:
        if base.endswith("e"):
            past = base + "d"
        elif base.endswith("y") and base[-2] not in "aeiou":
            past = base[:-1] + "ied"
        else:
            past = base + "ed"
    stem = base[:-1] if base.endswith("e") and not base.endswith("ee") else base
    return Verb(base, _with_s(base), past, ing or stem + "ing")


def _places(text: str) -> tuple[tuple[str, str], ...]:
    """Read "in: kitchen cafe, near: oven" as pairs of preposition and noun."""
    pairs = []
    for group in text.split(", "):
        preposition, _, nouns = group.partition(": ")
        pairs += [(preposition, noun) for noun in nouns.split()]
    return tuple(pairs)


def _scene(entry: Mapping[str, Any]) -> Scene:
    fields: dict[str, Any] = {
        name: tuple(value.split()) if isinstance(value, str) else value
        for name, value in entry.items()
    }
    fields["verbs"] = tuple(_verb(verb) for verb in fields["verbs"])
    fields["places"] = _places(entry["places"])
    return Scene(**fields)


def _words(text: str) -> tuple[tuple[Tagged, ...], ...]:
    """Read "ADJ: kind shy" as entries of one tagged word."""
    tag, _, words = text.partition(": ")
    return tuple(((word, tag),) for word in words.split())


def _phrase(text: str) -> tuple[Tagged, ...]:
    """Read "after/ADP lunch/NOUN" as tagged words."""
    pairs = [token.rpartition("/") for token in text.split()]
    return tuple((word, tag) for word, _, tag in pairs)


SCENES = tuple(_scene(entry) for entry in _DATA["scenes"])
# The verbs of these scenes take no object; the objects are met on the way.
JOURNEYS = tuple(_scene(entry) for entry in _DATA["journeys"])

TEMPLATES: Mapping[str, tuple[str, ...]] = {
    kind: tuple(templates) for kind, templates in _DATA["templates"].items()
}
"""The templates: of any scene, of objects that belong to somebody, and of journeys."""

PLACE_QUALITIES = {
    noun: tuple(qualities.split())
    for nouns, qualities in _DATA["place_qualities"]
    for noun in nouns.split()
}
FUNCTION_WORDS = {
    word: tag for tag, words in _DATA["function_words"].items() for word in words.split()
}

# Slots that do not depend on the scene.
LISTS = {name: _words(text) for name, text in _DATA["words"].items()} | {
    name: tuple(_phrase(text) for text in phrases) for name, phrases in _DATA["phrases"].items()
}
