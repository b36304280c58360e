"""Mapping and algorithmic tasks: their contents, their sampling, and the JSON loader."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from transformer_lens_taskvec.tasks.algorithmic import ListTask, algorithmic_tasks
from transformer_lens_taskvec.tasks.base import Example, MappingTask, Task
from transformer_lens_taskvec.tasks.formats.json_pairs import load_mapping
from transformer_lens_taskvec.tasks.mappings import (
    knowledge_tasks,
    linguistic_tasks,
    translation_tasks,
)

MAPPINGS = {**linguistic_tasks(), **knowledge_tasks(), **translation_tasks()}
ALGORITHMIC = algorithmic_tasks()
ALL = {**MAPPINGS, **ALGORITHMIC}
LISTS = ("list_first", "list_last")
FUNCTION_VECTORS = Path(__file__).parents[2] / "shared" / "data" / "function_vectors"

MIN_PAIRS = {
    "antonyms": 120,
    "singular_plural": 150,
    "plural_singular": 150,
    "present_past": 140,
    "past_present": 140,
    "present_gerund": 140,
    "gerund_present": 140,
    "adjective_comparative": 100,
    "adjective_superlative": 100,
    "adjective_adverb": 100,
    "country_capital": 140,
    "capital_country": 140,
    "country_continent": 140,
    "landmark_country": 100,
    "element_symbol": 118,
    "en_fr": 150,
    "fr_en": 150,
    "en_es": 150,
    "es_en": 150,
    "en_de": 120,
    "de_en": 120,
    "upper_case": 300,
    "lower_case": 300,
    "capitalize": 300,
    "first_letter": 300,
    "last_letter": 300,
    "next_letter": 25,
    "previous_letter": 25,
    "next_number": 201,
}
REVERSES = {
    "singular_plural": "plural_singular",
    "present_past": "past_present",
    "present_gerund": "gerund_present",
    "country_capital": "capital_country",
    "en_fr": "fr_en",
    "en_es": "es_en",
    "en_de": "de_en",
    "next_letter": "previous_letter",
    "upper_case": "lower_case",
}


def answers(task: Task) -> dict[str, str]:
    assert isinstance(task, MappingTask)
    return {example.x: example.y for example in task.pairs}


def write(folder: Path, text: str, name: str = "pairs.json") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# Contents


def test_the_groups_hold_the_promised_tasks_under_their_own_names() -> None:
    assert set(ALL) == {*MIN_PAIRS, *LISTS}
    assert all(task.name == name for name, task in ALL.items())
    assert all(isinstance(task, Task) for task in ALL.values())


@pytest.mark.parametrize("name", MIN_PAIRS)
def test_a_task_has_the_promised_number_of_pairs_with_distinct_inputs(name: str) -> None:
    task = ALL[name]
    assert isinstance(task, MappingTask)
    assert len(task) == len(task.pairs) >= MIN_PAIRS[name]
    assert len({example.x for example in task.pairs}) == len(task)


@pytest.mark.parametrize("name", MIN_PAIRS)
def test_texts_have_no_spare_spaces_and_inputs_never_equal_answers(name: str) -> None:
    letter_tasks = ("first_letter", "last_letter")
    for x, y in answers(ALL[name]).items():
        for text in (x, y):
            assert text == " ".join(text.split()) != ""
            assert not {"\t", "#"} & set(text)
        assert x != y
        if name not in (*letter_tasks, "upper_case", "lower_case", "capitalize"):
            assert x.casefold() != y.casefold()


@pytest.mark.parametrize(("forward", "reverse"), REVERSES.items())
def test_a_reverse_task_inverts_its_forward_task(forward: str, reverse: str) -> None:
    inverted = {y: x for x, y in answers(ALL[forward]).items()}
    assert answers(ALL[reverse]) == inverted
    assert len(inverted) == len(answers(ALL[forward]))


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("antonyms", {"hot": "cold", "always": "never", "buy": "sell"}),
        ("singular_plural", {"cat": "cats", "city": "cities", "child": "children", "boy": "boys"}),
        ("plural_singular", {"mice": "mouse", "boxes": "box", "leaves": "leaf"}),
        ("present_past", {"walk": "walked", "go": "went", "stop": "stopped", "try": "tried"}),
        ("past_present", {"thought": "think", "enjoyed": "enjoy"}),
        ("present_gerund", {"run": "running", "make": "making", "die": "dying", "see": "seeing"}),
        ("gerund_present", {"visiting": "visit", "tying": "tie"}),
        ("adjective_comparative", {"big": "bigger", "happy": "happier", "good": "better"}),
        ("adjective_superlative", {"wide": "widest", "clean": "cleanest", "bad": "worst"}),
        ("adjective_adverb", {"quick": "quickly", "easy": "easily", "true": "truly"}),
        ("country_capital", {"France": "Paris", "Australia": "Canberra", "Brazil": "Brasília"}),
        ("capital_country", {"Nairobi": "Kenya", "Oslo": "Norway"}),
        ("country_continent", {"Peru": "South America", "Fiji": "Oceania", "Mali": "Africa"}),
        ("landmark_country", {"Eiffel Tower": "France", "Machu Picchu": "Peru"}),
        ("element_symbol", {"hydrogen": "H", "gold": "Au", "tungsten": "W", "oganesson": "Og"}),
        ("en_fr", {"dog": "chien", "school": "école", "eat": "manger", "beautiful": "beau"}),
        ("es_en", {"árbol": "tree", "año": "year", "comer": "eat"}),
        ("en_de", {"house": "Haus", "key": "Schlüssel", "street": "Straße", "drink": "trinken"}),
        ("upper_case", {"water": "WATER"}),
        ("lower_case", {"WATER": "water"}),
        ("capitalize", {"water": "Water"}),
        ("first_letter", {"water": "w"}),
        ("last_letter", {"water": "r"}),
        ("next_letter", {"a": "b", "y": "z"}),
        ("previous_letter", {"b": "a", "z": "y"}),
        ("next_number", {"0": "1", "99": "100", "200": "201"}),
    ],
)
def test_known_pairs_are_there(name: str, pairs: dict[str, str]) -> None:
    assert pairs.items() <= answers(ALL[name]).items()


def test_no_antonym_stands_twice_in_either_column() -> None:
    pairs = answers(MAPPINGS["antonyms"])
    assert len({*pairs, *pairs.values()}) == 2 * len(pairs)


@pytest.mark.parametrize("name", ["country_capital", "element_symbol"])
def test_knowledge_with_one_answer_each_has_distinct_answers(name: str) -> None:
    pairs = answers(MAPPINGS[name])
    assert len(set(pairs.values())) == len(pairs)


def test_element_symbols_are_well_formed() -> None:
    for element, symbol in answers(MAPPINGS["element_symbol"]).items():
        assert re.fullmatch("[a-z]{3,}", element)
        assert re.fullmatch("[A-Z][a-z]?", symbol)


def test_there_are_six_continents() -> None:
    assert set(answers(MAPPINGS["country_continent"]).values()) == {
        "Africa",
        "Asia",
        "Europe",
        "North America",
        "South America",
        "Oceania",
    }


def test_comparatives_and_superlatives_share_their_adjectives_and_stems() -> None:
    comparative = answers(MAPPINGS["adjective_comparative"])
    superlative = answers(MAPPINGS["adjective_superlative"])
    irregular = {"good", "bad"}
    assert comparative.keys() == superlative.keys() > irregular
    for adjective in comparative.keys() - irregular:
        stem = comparative[adjective].removesuffix("r")
        assert superlative[adjective] == stem + "st"


def test_regular_word_forms_follow_the_spelling_rules() -> None:
    for singular, plural in answers(MAPPINGS["singular_plural"]).items():
        if re.search("(s|x|z|ch|sh)$", singular) and plural.endswith("s"):
            assert plural in (singular + "es", singular[:-2] + "es")
        if re.search("[^aeiou]y$", singular):
            assert plural == singular[:-1] + "ies"
    for verb, gerund in answers(MAPPINGS["present_gerund"]).items():
        doubled, without_e, y = verb + verb[-1] + "ing", verb[:-1] + "ing", verb[:-2] + "ying"
        expected = {
            "ie": {y},
            "ee": {verb + "ing"},
        }.get(verb[-2:], {without_e} if verb[-1] == "e" else {verb + "ing", doubled})
        assert gerund in expected
    for verb, past in answers(MAPPINGS["present_past"]).items():
        if past.endswith("ed") and verb not in ("bleed", "feed", "lead"):
            assert past in (
                verb + "ed",
                verb + verb[-1] + "ed",
                verb.removesuffix("e") + "ed",
                verb.removesuffix("y") + "ied",
            )


def test_algorithmic_words_are_lower_case_ascii_of_two_letters_or_more() -> None:
    assert all(re.fullmatch("[a-z]{2,}", word) for word in answers(ALGORITHMIC["upper_case"]))


# Sampling


@pytest.mark.parametrize("name", ALL)
@pytest.mark.usefixtures("unchecked")  # beartype draws at random what it looks at
def test_sampling_depends_on_the_generator_alone_and_repeats_no_input(name: str) -> None:
    task = ALL[name]
    first, second = (task.sample(20, random.Random(seed)) for seed in (3, 4))
    state = random.getstate()
    assert ALL[name].sample(20, random.Random(3)) == first
    assert random.getstate() == state
    assert first != second
    assert len({example.x for example in first}) == 20


@pytest.mark.parametrize("name", MIN_PAIRS)
def test_a_full_sample_is_every_pair_and_one_more_is_an_error(name: str) -> None:
    task = ALL[name]
    assert isinstance(task, MappingTask)
    assert set(task.sample(len(task), random.Random(0))) == set(task.pairs)
    with pytest.raises(ValueError, match=f"'{name}' was asked for {len(task) + 1} examples"):
        task.sample(len(task) + 1, random.Random(0))


@pytest.mark.parametrize(("name", "item"), [("list_first", 0), ("list_last", -1)])
def test_a_list_task_answers_with_its_item_of_three_to_five_different_words(
    name: str, item: int
) -> None:
    words = set(answers(ALGORITHMIC["upper_case"]))
    lengths = set()
    for example in ALGORITHMIC[name].sample(300, random.Random(0)):
        items = example.x.split(", ")
        assert example.y == items[item]
        assert set(items) <= words
        assert len(set(items)) == len(items)
        lengths.add(len(items))
    assert lengths == {3, 4, 5}


def test_a_list_task_can_be_exhausted_and_knows_its_size() -> None:
    task = ListTask("pick", 1, ("a", "b", "c"), min_length=2, max_length=3)
    assert len(task) == 6 + 6
    assert len({example.x for example in task.sample(12, random.Random(0))}) == 12
    with pytest.raises(ValueError, match="asked for 13 examples with distinct inputs and has 12"):
        task.sample(13, random.Random(0))


def test_the_size_of_a_list_task_never_overflows() -> None:
    assert len(ListTask("long", 0, tuple(map(str, range(99))), max_length=50)) > 10**18


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"words": ("a", "b")}, "2 words cannot make lists of 3 to 5 distinct words"),
        ({"min_length": 0}, "lists of 0 to 5"),
        ({"min_length": 5, "max_length": 4}, "lists of 5 to 4"),
        ({"item": 3}, "item=3 is outside a list of 3 words; use -3 to 2"),
        ({"words": ("a", "b", "c", "d", "a")}, "must be distinct"),
        ({"words": ("a", "b", "c", "d", "e, f")}, "cannot contain the word 'e, f'"),
        ({"words": ("a", "b", "c", "d", " ")}, "cannot contain the word ' '"),
    ],
)
def test_a_list_task_that_cannot_be_made_says_why(fields: dict[str, Any], message: str) -> None:
    defaults: dict[str, Any] = {"name": "list", "item": 0, "words": ("a", "b", "c", "d", "e")}
    with pytest.raises(ValueError, match=re.escape(message)):
        ListTask(**{**defaults, **fields})


# Loading


@pytest.mark.parametrize(
    ("stem", "example"),
    [
        ("antonym", Example("flawed", "perfect")),
        ("country-capital", Example("Afghanistan", "Kabul")),
        ("present-past", Example("accelerate", "accelerated")),
        ("singular-plural", Example("wallet", "wallets")),
    ],
)
def test_public_function_vector_files_load_whole(stem: str, example: Example) -> None:
    path = FUNCTION_VECTORS / f"{stem}.json"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    task = load_mapping(path)
    entries = json.loads(path.read_text(encoding="utf-8"))
    assert task.name == stem
    assert task.pairs[0] == example
    assert {pair.x for pair in task.pairs} == {entry["input"] for entry in entries}


@pytest.mark.parametrize(
    "text",
    [
        '{"sky": "blue", "école": "vert "}',
        '[{"input": "sky", "output": "blue", "id": 7}, {"output": "vert ", "input": "école"}]',
        '\ufeff{"sky": "blue", "école": "vert "}',
    ],
    ids=["object", "array", "byte order mark"],
)
def test_both_shapes_load_in_order_with_texts_unchanged(tmp_path: Path, text: str) -> None:
    task = load_mapping(write(tmp_path, text))
    assert task.pairs == (Example("sky", "blue"), Example("école", "vert "))


@pytest.mark.parametrize(
    "text",
    [
        '{"a": "1", "b": "2", "a": "3"}',
        json.dumps([{"input": x, "output": y} for x, y in ("a1", "b2", "a3")]),
    ],
    ids=["object", "array"],
)
def test_the_first_of_several_pairs_with_one_input_counts(tmp_path: Path, text: str) -> None:
    assert answers(load_mapping(write(tmp_path, text))) == {"a": "1", "b": "2"}


def test_a_loaded_task_is_named_after_its_file_unless_told_otherwise(tmp_path: Path) -> None:
    path = write(tmp_path, '{"a": "b"}', "my-task.json")
    assert load_mapping(path).name == "my-task"
    assert load_mapping(str(path), name="mine").name == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ", line 1: not valid JSON (Expecting value)"),
        ('{\n"a": "b",\n"c" "d"\n}', ", line 3: not valid JSON (Expecting ':' delimiter)"),
        ('{"a": "b"', ", line 1: not valid JSON"),
        ('{"a": "b"}\n{"c": "d"}', ", line 2: not valid JSON (Extra data)"),
        ("[" * 100_000, ": the JSON is nested too deeply"),
        ('{"a":' * 100_000, ": the JSON is nested too deeply"),
        ('{"a": ' + "9" * 10_000 + "}", ": a number is too long"),
    ],
    ids=["empty", "colon", "unclosed", "json lines", "deep array", "deep object", "long number"],
)
def test_what_is_not_json_is_refused_with_file_and_line(
    tmp_path: Path, text: str, message: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=re.escape(f"{path}{message}")):
        load_mapping(path)


@pytest.mark.parametrize("text", ["{}", "[]"])
def test_a_file_without_pairs_is_refused(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=re.escape(f"{path} has no pairs; give at least one")):
        load_mapping(path)


@pytest.mark.parametrize(("text", "got"), [('"a"', "'a'"), ("null", "null"), ("3.5", "3.5")])
def test_json_of_another_shape_is_refused_with_the_shapes_that_load(
    tmp_path: Path, text: str, got: str
) -> None:
    path = write(tmp_path, text)
    shapes = '{"x": "y", ...} or [{"input": "x", "output": "y"}, ...]'
    with pytest.raises(ValueError, match=re.escape(f"{path}: expected {shapes}, got {got}")):
        load_mapping(path)


@pytest.mark.parametrize(
    ("text", "entry", "message"),
    [
        ('{"a": "b", "c": 3}', 1, "the output must be a string, got 3"),
        ('{"a": null}', 0, "the output must be a string, got null"),
        ('{"a": NaN}', 0, "the output must be a string, got NaN"),
        ('{"a": ["b", "c"]}', 0, "the output must be a string, got an array of length 2"),
        ('{"a": {"b": "c"}}', 0, "the output must be a string, got an object with the keys 'b'"),
        ('{"a": " "}', 0, "the output is empty"),
        ('{"a": "b", "": "c"}', 1, "the input is empty"),
        (r'{"a": "\ud800"}', 0, r"the output '\ud800' contains half of a surrogate pair"),
        ('["a", "b"]', 0, "expected an object with an input and an output, got 'a'"),
        (
            '[["input", "output"]]',
            0,
            "expected an object with an input and an output, got an array",
        ),
        (
            '[{"input": "a", "output": "b"}, {"input": "c"}]',
            1,
            "expected an object with an input and an output, got an object with the keys 'input'",
        ),
        ('[{"x": 1, "y": 2}]', 0, "and an output, got an object with the keys 'x', 'y'"),
        ("[{}]", 0, "expected an object with an input and an output, got an empty object"),
        ('[{"input": 5, "output": "b"}]', 0, "the input must be a string, got 5"),
        ('[{"input": "a", "output": true}]', 0, "the output must be a string, got true"),
        ('[{"input": "a", "output": ""}]', 0, "the output is empty"),
        ('{"a": "b", "a": 3}', 1, "the output must be a string, got 3"),
    ],
)
def test_a_bad_entry_is_refused_with_its_number(
    tmp_path: Path, text: str, entry: int, message: str
) -> None:
    path = write(tmp_path, text)
    place = f"{path}, entry {entry} (counted from 0): "
    with pytest.raises(ValueError, match=f"^{re.escape(place)}.*{re.escape(message)}"):
        load_mapping(path)


def test_a_file_that_is_not_utf_8_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.json"
    path.write_bytes('{\n"school": "école"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2: not UTF-8")):
        load_mapping(path)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_mapping(tmp_path / "missing.json")
