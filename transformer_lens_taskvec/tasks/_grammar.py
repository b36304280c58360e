"""The grammar behind ``generate_sentences``: how a template and a scene become a sentence.

A template is a line of slots (``$past``) and function words. All slots of one sentence draw from
the same scene, so that agent, action, object and place fit together. The words and templates are in
:mod:`~transformer_lens_taskvec.tasks._vocabulary`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from transformer_lens_taskvec.tasks import _vocabulary as vocabulary

Tagged = tuple[str, str]
Slot = Callable[["_Sentence"], tuple[Tagged, ...]]

# Subject, object and possessive form, and the past of "be".
_PRONOUNS = {
    "he": ("he", "him", "his", "was"),
    "she": ("she", "her", "her", "was"),
    "they": ("they", "them", "their", "were"),
    "we": ("we", "us", "our", "were"),
    "I": ("I", "me", "my", "was"),
}
_SINGULAR, _PLURAL, _ANYONE = ("he", "she"), ("they", "we", "I"), tuple(_PRONOUNS)
_VOWELS = frozenset("aeiou")


class _Sentence:
    """The choices made once per sentence, so that its slots agree."""

    def __init__(self, scene: vocabulary.Scene, rng: random.Random) -> None:
        choose = rng.choice
        self.scene, self.choose = scene, choose
        self.agent = choose(scene.agents)
        self.obj = choose(scene.objects)
        self.quality = choose(scene.qualities)
        self.place = choose(scene.places)
        self.verb = choose(scene.verbs)
        self.anyone = _PRONOUNS[choose(_ANYONE)]
        self.several = _PRONOUNS[choose(_PLURAL)]
        gender = vocabulary.GENDER.get(self.agent) or choose(_SINGULAR)
        self.third = _PRONOUNS[gender]
        self.patient = _PRONOUNS[vocabulary.GENDER.get(self.obj) or choose(_SINGULAR)]


@dataclass(frozen=True)
class _Words:
    """A slot filled by one entry of a list; an entry is one or more tagged words."""

    entries: tuple[tuple[Tagged, ...], ...]

    def __call__(self, sentence: _Sentence) -> tuple[Tagged, ...]:
        return sentence.choose(self.entries)


def _place(sentence: _Sentence) -> tuple[Tagged, ...]:
    preposition, noun = sentence.place
    return (preposition, "ADP"), ("the", "DET"), (noun, "NOUN")


def _nice_place(sentence: _Sentence) -> tuple[Tagged, ...]:
    preposition, noun = sentence.place
    adjective = sentence.choose(vocabulary.PLACE_QUALITIES[noun])
    return (preposition, "ADP"), ("the", "DET"), (adjective, "ADJ"), (noun, "NOUN")


def _objects(sentence: _Sentence) -> tuple[Tagged, ...]:
    mass = sentence.obj in vocabulary.MASS_NOUNS
    return ((sentence.obj if mass else vocabulary.plural(sentence.obj), "NOUN"),)


def _object_pronoun(sentence: _Sentence) -> tuple[Tagged, ...]:
    return ((sentence.patient[1] if sentence.scene.objects_are_people else "it", "PRON"),)


_SLOTS: dict[str, Slot] = {
    "agent": lambda s: ((s.agent, "NOUN"),),
    "agents": lambda s: ((vocabulary.plural(s.agent), "NOUN"),),
    "obj": lambda s: ((s.obj, "NOUN"),),
    "objs": _objects,
    "it": _object_pronoun,
    "quality": lambda s: ((s.quality, "ADJ"),),
    "place": _place,
    "nice_place": _nice_place,
    "base": lambda s: ((s.verb.base, "VERB"),),
    "past": lambda s: ((s.verb.past, "VERB"),),
    "ing": lambda s: ((s.verb.ing, "VERB"),),
    "third": lambda s: ((s.verb.third, "VERB"),),
    "manner": lambda s: ((s.choose(s.scene.manners), "ADV"),),
    "he": lambda s: ((s.anyone[0], "PRON"),),
    "his": lambda s: ((s.anyone[2], "PRON"),),
    "was": lambda s: ((s.anyone[3], "AUX"),),
    "we": lambda s: ((s.several[0], "PRON"),),
    "us": lambda s: ((s.several[1], "PRON"),),
    "our": lambda s: ((s.several[2], "PRON"),),
    "name": lambda s: ((s.choose(vocabulary.NAMES[s.third[0]]), "PROPN"),),
    "agent_he": lambda s: ((s.third[0], "PRON"),),
    "agent_his": lambda s: ((s.third[2], "PRON"),),
    **{name: _Words(entries) for name, entries in vocabulary.LISTS.items()},
}


def _compile(template: str) -> tuple[Slot, ...]:
    """Return the functions that fill a template, one per word of it."""
    return tuple(
        _SLOTS[token[1:]]
        if token.startswith("$")
        else _Words((((token, vocabulary.FUNCTION_WORDS[token]),),))
        for token in template.split()
    )


_SCENES = {
    "any": vocabulary.SCENES,
    "owners": tuple(scene for scene in vocabulary.SCENES if scene.objects_have_owners),
    "journeys": vocabulary.JOURNEYS,
}
_TEMPLATES = tuple(
    (_compile(template), _SCENES[kind])
    for kind, templates in vocabulary.TEMPLATES.items()
    for template in templates
)


def fill(rng: random.Random) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return a random template filled with words of a random scene.

    Args:
        rng: The only source of randomness.

    Returns:
        The words, the first capitalised and the last a full stop, and the UPOS tag of each.
    """
    parts, scenes = rng.choice(_TEMPLATES)
    sentence = _Sentence(rng.choice(scenes), rng)
    tagged = [word for part in parts for word in part(sentence)]
    words = [word for word, _ in tagged]
    for i, word in enumerate(words):
        if word == "a":
            words[i] = _article(words[i + 1 :], sentence.obj)
    words[0] = words[0][0].upper() + words[0][1:]
    return (*words, "."), (*(tag for _, tag in tagged), "PUNCT")


def _article(following: list[str], obj: str) -> str:
    """Return the indefinite article before these words: "a", "an", or "some" for a mass noun."""
    if obj in vocabulary.MASS_NOUNS and obj in following[:2]:
        return "some"
    word = following[0]
    if word in vocabulary.CONSONANT_SOUND:
        return "a"
    return "an" if word[0] in _VOWELS or word in vocabulary.VOWEL_SOUND else "a"
