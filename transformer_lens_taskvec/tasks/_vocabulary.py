"""The words of ``generate_sentences``, by meaning and part of speech.

Every word form has one part of speech in the whole vocabulary (so no noun "cook" alongside a verb
"cook"), and words on whose tag annotators disagree are left out: participles as adjectives,
"that", "there", subordinating conjunctions, compound nouns, verb particles.
"""

from __future__ import annotations

from dataclasses import dataclass

Tagged = tuple[str, str]

_IRREGULAR_PLURALS = {
    "child": "children", "woman": "women", "man": "men", "scarf": "scarves", "wolf": "wolves",
    "calf": "calves", "loaf": "loaves", "piano": "pianos", "photo": "photos", "thief": "thieves",
    "fisherman": "fishermen",
}  # fmt: skip
MASS_NOUNS = frozenset([
    "bread", "soup", "stew", "rice", "pasta", "curry", "tea", "coffee", "juice", "lemonade",
    "milk", "cocoa", "soda",
])  # fmt: skip
GENDER = {
    "grandmother": "she", "grandfather": "he", "girl": "she", "boy": "he", "woman": "she",
    "man": "he", "actress": "she", "king": "he", "queen": "she", "fisherman": "he",
    "princess": "she", "prince": "he", "waitress": "she",
}  # fmt: skip
NAMES = {
    "she": ("Maria", "Anna", "Laura", "Sofia", "Emma"),
    "he": ("David", "Thomas", "Peter", "Daniel", "Martin"),
}
CONSONANT_SOUND = frozenset(["useful", "unique", "uniform", "university", "usually"])
VOWEL_SOUND = frozenset(["honest", "hour"])


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
    return _IRREGULAR_PLURALS.get(noun) or _with_s(noun)


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
    for group in text.split(","):
        preposition, _, nouns = group.strip().partition(": ")
        pairs += [(preposition, noun) for noun in nouns.split()]
    return tuple(pairs)


def _scene(
    agents: str, verbs: str, objects: str, qualities: str, places: str, manners: str,
    people: bool = False, owners: bool = True,
) -> Scene:  # fmt: skip
    return Scene(
        tuple(agents.split()), tuple(_verb(entry) for entry in verbs.split()),
        tuple(objects.split()), tuple(qualities.split()), _places(places),
        tuple(manners.split()), people, owners,
    )  # fmt: skip


SCENES = (
    _scene(
        "chef baker waiter grandmother student farmer neighbor",
        "bake serve taste sell share",
        "bread cake pie pizza pastry muffin pancake loaf",
        "fresh warm sweet delicious simple large traditional",
        "in: kitchen bakery restaurant, at: market festival, beside: oven, near: window",
        "carefully slowly patiently cheerfully quickly proudly",
    ),
    _scene(
        "chef waiter waitress guest family student captain",
        "prepare serve taste order enjoy finish eat:ate",
        "soup stew salad sandwich omelet pasta rice curry",
        "hot delicious simple fresh tasty healthy cheap salty",
        "in: restaurant kitchen cafe hotel, at: table counter wedding, near: fireplace",
        "slowly quickly quietly eagerly happily silently",
    ),
    _scene(
        "waiter student guest grandmother traveler nurse clerk",
        "pour drink:drank taste order serve prepare",
        "tea coffee juice lemonade milk cocoa soda",
        "hot cold sweet bitter strong fresh cheap",
        "at: counter table, in: cafe kitchen garden office, on: balcony terrace",
        "slowly carefully quietly quickly happily calmly",
    ),
    _scene(
        "student teacher clerk writer secretary poet editor",
        "read:read write:wrote copy sign discuss finish",
        "letter report story novel poem article essay speech",
        "long short strange serious famous difficult brief funny sad",
        "in: library office classroom, at: desk, on: train porch, near: window",
        "carefully quickly silently slowly thoroughly secretly",
    ),
    _scene(
        "tourist merchant traveler customer child student soldier",
        "find:found hide:hid carry borrow sell:sold buy:bought",
        "lamp umbrella suitcase basket blanket mirror key wallet camera necklace coin map bottle",
        "old small beautiful expensive cheap strange new unusual rare",
        "in: attic hotel shop, at: market airport, behind: counter, under: bench, near: station",
        "quickly secretly quietly eagerly happily",
    ),
    _scene(
        "mechanic engineer carpenter plumber farmer electrician technician",
        "repair clean inspect fix test examine adjust",
        "engine machine bicycle clock radio pump tractor computer printer",
        "old new rusty noisy expensive heavy large complex",
        "in: garage workshop basement, behind: barn factory, near: gate entrance",
        "carefully quickly patiently skillfully properly thoroughly",
    ),
    _scene(
        "carpenter builder architect farmer soldier king fisherman",
        "build:built paint repair design measure finish",
        "house fence bridge wall tower cottage boat shed cabin roof",
        "tall small strong large narrow beautiful modern simple",
        "near: river lake beach, beside: road field church, behind: school mill, in: village",
        "slowly carefully skillfully patiently steadily gradually",
    ),
    _scene(
        "gardener farmer grandmother child neighbor botanist",
        "water plant trim:trimmed:trimming photograph protect admire",
        "tree flower bush vine herb lily tulip orchid pumpkin",
        "beautiful healthy young tiny delicate green rare",
        "in: garden greenhouse yard, beside: gate path pond, behind: cottage, near: wall fence",
        "gently carefully regularly patiently happily quietly",
    ),
    _scene(
        "farmer veterinarian child girl boy shepherd woman",
        "feed:fed brush wash rescue raise follow",
        "horse dog cat goat puppy kitten pony lamb rabbit donkey calf",
        "small old young gentle hungry thin brown white playful",
        "in: barn stable field yard, near: pond fence river, behind: house, on: hill",
        "gently calmly patiently quietly kindly cheerfully",
    ),
    _scene(
        "tourist hiker scientist photographer hunter traveler child",
        "watch photograph observe follow study describe",
        "eagle fox bear owl whale wolf swan turtle seal snake lizard",
        "wild large young rare beautiful graceful lonely quiet dangerous",
        "near: lake cave waterfall, in: forest valley desert, on: island beach, beside: river",
        "quietly silently carefully briefly patiently eagerly",
        owners=False,
    ),
    _scene(
        "artist tourist student collector queen prince professor",
        "draw:drew admire sell:sold buy:bought describe study",
        "portrait sculpture statue picture vase poster mural mask",
        "famous beautiful colorful ancient modern strange large expensive abstract",
        "in: museum gallery studio palace, at: exhibition school, near: window entrance",
        "carefully slowly skillfully silently quickly proudly",
    ),
    _scene(
        "musician pianist singer violinist student princess",
        "perform practice compose play record",
        "song melody tune waltz ballad anthem sonata symphony",
        "sad old new beautiful long difficult popular short gentle",
        "at: concert wedding festival, in: theater church studio, on: stage balcony",
        "beautifully softly loudly proudly perfectly gladly",
    ),
    _scene(
        "doctor nurse scientist dentist surgeon volunteer",
        "examine treat help visit comfort",
        "patient teenager athlete visitor passenger child pilot",
        "young old weak nervous brave elderly quiet sick",
        "in: hospital clinic tent, at: station camp, near: window, on: ship",
        "gently kindly carefully quickly politely quietly",
        people=True,
    ),
    _scene(
        "teacher professor tutor librarian principal grandfather",
        "teach:taught help encourage thank greet praise",
        "pupil girl boy beginner child student teenager",
        "young shy clever lazy polite curious ambitious",
        "in: classroom library gym, at: school university, on: bus",
        "patiently kindly gently politely warmly calmly",
        people=True,
    ),
    _scene(
        "manager guard receptionist driver guide waiter actress",
        "greet meet:met follow invite thank",
        "guest visitor stranger actor senator tourist reporter lawyer",
        "famous rich elegant important wealthy young quiet mysterious rude",
        "at: airport hotel station, in: lobby restaurant corridor, near: elevator gate entrance",
        "politely warmly quietly silently cheerfully",
        people=True,
    ),
    _scene(
        "manager lawyer accountant secretary analyst clerk director",
        "review discuss explain prepare reject approve revise",
        "budget plan proposal contract schedule invoice policy project",
        "new ambitious complex important risky simple flexible",
        "in: office, at: conference bank factory university, before: deadline",
        "carefully briefly thoroughly calmly quickly confidently",
    ),
    _scene(
        "tailor actress customer student boy woman dancer",
        "wear:wore wash buy:bought choose:chose borrow fold",
        "jacket coat dress shirt scarf sweater hat skirt costume",
        "blue warm elegant red old white expensive new comfortable",
        "at: wedding shop market party, in: hotel theater, near: mirror",
        "proudly carefully quickly quietly happily gladly",
    ),
    _scene(
        "captain driver sailor mechanic fisherman soldier",
        "steer clean repair rent borrow inspect",
        "truck boat ship bus van ferry car canoe",
        "old small heavy modern slow rusty large reliable",
        "near: harbor bridge factory, at: dock, beside: river road, behind: warehouse",
        "carefully slowly patiently safely skillfully quickly",
    ),
)

# The verbs of these scenes take no object; the objects are met on the way.
JOURNEYS = (
    _scene(
        "hiker tourist soldier farmer hunter child traveler shepherd",
        "walk hike wander hurry travel",
        "village castle temple cottage waterfall cabin",
        "distant ancient small beautiful famous lonely",
        "through: forest valley field, along: river path trail beach, across: desert bridge",
        "slowly quickly silently cheerfully steadily",
    ),
    _scene(
        "sailor captain fisherman scientist tourist king merchant",
        "sail row drift float",
        "island harbor lighthouse castle town beach",
        "distant ancient small quiet famous tropical",
        "across: lake bay, along: river coast canal, around: island",
        "slowly quickly silently peacefully steadily safely",
    ),
    _scene(
        "student nurse doctor actor teacher waiter lawyer reporter",
        "run:ran:running walk cycle stroll drive:drove",
        "hotel station museum hospital theater office",
        "large modern old famous busy small",
        "through: tunnel square city, across: bridge square, past: church library, along: avenue",
        "quickly slowly calmly happily carefully",
    ),
)

_ROOM = """
    kitchen bakery restaurant cafe library office classroom attic hotel shop garage workshop
    basement museum gallery studio palace theater church hospital clinic gym school university
    lobby corridor factory bank stable barn greenhouse cottage house warehouse airport station
    terrace balcony porch stage ship train bus tent camp mill tunnel dock
"""
_OPEN = """
    garden yard field forest valley village beach island river lake pond road trail path hill
    harbor desert waterfall cave bay coast canal square city avenue
"""
_FIXTURE = """
    oven window fireplace table counter desk bench gate wall fence entrance elevator bridge mirror
"""
_EVENT = "market festival wedding concert exhibition conference party"
_QUALITIES_BY_KIND = {
    _ROOM: ("small", "large", "quiet", "old", "modern", "new"),
    _OPEN: ("small", "quiet", "beautiful", "peaceful", "lovely"),
    _FIXTURE: ("old", "small", "large", "new"),
    _EVENT: ("big", "noisy", "local", "lively", "annual"),
    "deadline": ("final", "important", "strict"),
}
PLACE_QUALITIES = {
    noun: qualities for nouns, qualities in _QUALITIES_BY_KIND.items() for noun in nouns.split()
}

FUNCTION_WORDS = {
    ",": "PUNCT", "a": "DET", "the": "DET", "two": "NUM", "to": "PART",
    "and": "CCONJ", "but": "CCONJ", "is": "AUX", "was": "AUX",
    "it": "PRON", "who": "PRON", "their": "PRON", "me": "PRON", "your": "PRON",
    "in": "ADP", "with": "ADP", "without": "ADP", "about": "ADP", "for": "ADP", "toward": "ADP",
    "near": "ADP",
    "friends": "NOUN", "permission": "NOUN", "weather": "NOUN",
    "wait": "VERB", "meet": "VERB", "tell": "VERB", "show": "VERB", "saw": "VERB",
    "reach": "VERB", "asked": "VERB",
    "never": "ADV", "again": "ADV", "still": "ADV", "then": "ADV", "clearly": "ADV",
    "politely": "ADV",
}  # fmt: skip


def _list(tag: str, words: str) -> tuple[tuple[Tagged, ...], ...]:
    return tuple(((word, tag),) for word in words.split())


def _phrases(*phrases: str) -> tuple[tuple[Tagged, ...], ...]:
    """Read phrases in which every word is written ``word/TAG``."""
    tagged = []
    for phrase in phrases:
        pairs = [token.rpartition("/") for token in phrase.split()]
        tagged.append(tuple((word, tag) for word, _, tag in pairs))
    return tuple(tagged)


def _moments(preposition: str, adjectives: str, nouns: str, determiner: str) -> tuple[str, ...]:
    return tuple(
        f"{preposition}/ADP {determiner}/DET {adjective}/ADJ {noun}/NOUN"
        for adjective in adjectives.split()
        for noun in nouns.split()
    )


# Slots that do not depend on the scene.
LISTS = {
    "trait": _list(
        "ADJ", "friendly kind nervous shy clever cheerful polite famous tall busy generous honest"
    ),
    "kin": _list(
        "NOUN", "brother sister uncle aunt cousin neighbor grandmother grandfather colleague"
    ),
    "degree": _list("ADV", "very quite extremely unusually surprisingly remarkably fairly"),
    "often": _list("ADV", "often usually rarely always never sometimes frequently seldom"),
    "sometimes": _list("ADV", "sometimes usually occasionally often normally"),
    "finally": _list("ADV", "finally suddenly fortunately eventually luckily meanwhile soon"),
    "later": _list("ADV", "again immediately soon afterward"),
    "whose": _list("PRON", "my your his her our their"),
    "me": _list("PRON", "me us him her them"),
    "reacted": _list("VERB", "smiled laughed nodded waited bowed left"),
    "reaction": _list("ADV", "warmly politely quietly nervously proudly silently"),
    "waited": _list("VERB", "worked waited stayed"),
    "patiently": _list("ADV", "patiently quietly calmly silently"),
    "easy": _list("ADJ", "easy difficult possible necessary important impossible"),
    "weather": _list("ADJ", "cold hot windy dark foggy noisy humid"),
    "fine": _list("ADJ", "warm sunny cold rainy bad good windy"),
    "town": _list("NOUN", "villages towns cities countries regions"),
    "size": _list("ADJ", "small large poor rich northern southern remote"),
    "mood": _phrases(
        "curious/ADJ about/ADP", "nervous/ADJ about/ADP", "happy/ADJ about/ADP",
        "angry/ADJ about/ADP", "grateful/ADJ for/ADP", "sad/ADJ about/ADP",
    ),
    "news": _phrases(
        "the/DET news/NOUN", "the/DET weather/NOUN", "the/DET result/NOUN",
        "the/DET decision/NOUN", "the/DET advice/NOUN", "the/DET delay/NOUN",
    ),
    "lookout": _phrases(
        "from/ADP", "through/ADP", "near/ADP", "beside/ADP",
    ),
    "window": _list("NOUN", "window door"),
    "on_an_evening": _phrases(
        *_moments("on", "rainy sunny windy cold quiet foggy", "morning afternoon evening", "a"),
        *_moments("during", "long cold", "winter", "the"),
        *_moments("during", "long hot", "summer", "the"),
        *_moments("during", "long short", "holiday journey", "the"),
        *_moments("after", "short heavy sudden", "storm", "the"),
        *_moments("after", "long short famous", "concert lecture ceremony", "the"),
        *_moments("before", "annual big local", "festival parade wedding", "the"),
    ),
    "in_the_evening": _phrases(
        "in/ADP the/DET morning/NOUN", "in/ADP the/DET evening/NOUN",
        "in/ADP the/DET afternoon/NOUN", "during/ADP the/DET winter/NOUN",
        "during/ADP the/DET summer/NOUN", "before/ADP lunch/NOUN", "after/ADP dinner/NOUN",
        "after/ADP breakfast/NOUN", "on/ADP weekends/NOUN",
    ),
}  # fmt: skip
