"""Part-of-speech tasks, their generated sentences, and the loaders of treebanks."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from itertools import permutations
from pathlib import Path

import pytest

from transformer_lens_taskvec.tasks.base import Task
from transformer_lens_taskvec.tasks.formats.conllu import load_conllu
from transformer_lens_taskvec.tasks.formats.treebank import load_treebank
from transformer_lens_taskvec.tasks.pos import POS_TAGS, PosTask, pos_tasks
from transformer_lens_taskvec.tasks.sentences import Sentence, detokenise, generate_sentences

SIX = {"NOUN", "ADJ", "VERB", "ADV", "ADP", "PRON"}
EWT = Path(__file__).parents[2] / "shared" / "data" / "ud_english_ewt"


def tagged(text: str) -> Sentence:
    """Make a sentence from ``word/TAG`` tokens."""
    pairs = [token.rpartition("/") for token in text.split()]
    return Sentence(tuple(word for word, _, _ in pairs), tuple(tag for _, _, tag in pairs))


ALL_SIX = tagged("Slowly/ADV ,/PUNCT they/PRON fed/VERB a/DET thin/ADJ dog/NOUN in/ADP rain/NOUN")
NO_ADVERB = tagged("they/PRON fed/VERB a/DET thin/ADJ dog/NOUN in/ADP rain/NOUN")


# --- the tasks ---


def test_each_task_answers_with_the_first_word_of_its_kind() -> None:
    tasks = pos_tasks([ALL_SIX], null=False)
    answers = {name: task.sample(1, random.Random(0))[0].y for name, task in tasks.items()}
    assert answers == {
        "Noun": "dog",
        "Adjective": "thin",
        "Verb": "fed",
        "Adverb": "Slowly",
        "Preposition": "in",
        "Pronoun": "they",
    }


def test_the_input_is_the_text_of_the_sentence() -> None:
    example = pos_tasks([ALL_SIX])["Noun"].sample(1, random.Random(0))[0]
    assert example.x == "Slowly, they fed a thin dog in rain"


def test_null_comes_last_and_can_be_left_out() -> None:
    assert list(pos_tasks([ALL_SIX])) == [*POS_TAGS, "Null"]
    assert list(pos_tasks([ALL_SIX], null=False)) == list(POS_TAGS)


def test_null_answers_with_any_word_but_no_punctuation() -> None:
    null = pos_tasks([ALL_SIX])["Null"]
    rng = random.Random(0)
    answers = {null.sample(1, rng)[0].y for _ in range(300)}
    assert answers == set(ALL_SIX.words) - {","}


def test_sentences_without_all_six_parts_of_speech_are_left_out() -> None:
    noun = pos_tasks([NO_ADVERB, ALL_SIX])["Noun"]
    assert [example.x for example in noun.sample(1, random.Random(0))] == [ALL_SIX.text]
    with pytest.raises(ValueError, match="asked for 2 .* has 1"):
        noun.sample(2, random.Random(0))


def test_no_usable_sentence_is_an_error_with_the_number_given() -> None:
    with pytest.raises(ValueError, match="none of the 3 sentences given has all six parts"):
        pos_tasks([NO_ADVERB] * 3)
    with pytest.raises(ValueError, match="none of the 0 sentences"):
        pos_tasks([])


def test_equal_texts_count_once_and_the_first_one_stays() -> None:
    other = Sentence(ALL_SIX.words, (*ALL_SIX.tags[:-1], "PROPN"), ALL_SIX.text)
    task = pos_tasks([ALL_SIX, other, ALL_SIX])["Noun"]
    assert isinstance(task, PosTask)
    assert task.sentences == (ALL_SIX,)


def test_a_sentence_whose_answer_is_glued_to_another_word_is_left_out() -> None:
    words = "She/PRON slowly/ADV gon/VERB na/PART see/VERB a/DET thin/ADJ dog/NOUN in/ADP it/PRON"
    glued = tagged(words)
    glued = Sentence(glued.words, glued.tags, "She slowly gonna see a thin dog in it")
    with pytest.raises(ValueError, match="none of the 1"):
        pos_tasks([glued])
    apart = Sentence(glued.words, glued.tags, "She gonna slowly gon na see a thin dog in it")
    assert pos_tasks([apart])["Verb"].sample(1, random.Random(0))[0].y == "gon"


@pytest.mark.parametrize("name", ["Verb", "Null"])
@pytest.mark.usefixtures("unchecked")  # beartype draws at random what it looks at
def test_equal_seeds_give_equal_samples_without_the_global_random_state(name: str) -> None:
    task = pos_tasks()[name]
    state = random.getstate()
    first = task.sample(40, random.Random(3))
    assert random.getstate() == state
    assert first == task.sample(40, random.Random(3))
    assert first != task.sample(40, random.Random(4))
    assert len({example.x for example in first}) == 40


def test_the_repr_of_a_task_counts_its_sentences() -> None:
    task = pos_tasks()["Noun"]
    assert isinstance(task, Task)
    assert repr(task) == "PosTask('Noun', tag='NOUN', 6000 sentences)"


def test_a_task_made_by_hand_names_the_sentence_without_an_answer() -> None:
    with pytest.raises(ValueError, match="needs a word tagged ADV .* 'they fed a thin dog"):
        PosTask("Adverb", "ADV", (NO_ADVERB,)).sample(1, random.Random(0))


def test_a_sentence_needs_a_tag_for_each_word() -> None:
    with pytest.raises(ValueError, match="got 2 words and 1 tags"):
        Sentence(("a", "b"), ("X",))
    with pytest.raises(ValueError, match="got 0 words"):
        Sentence((), ())


# --- the generated sentences ---


@pytest.fixture(scope="module")
def generated() -> tuple[Sentence, ...]:
    return generate_sentences()


def test_thousands_of_distinct_sentences_have_all_six_parts_of_speech(
    generated: tuple[Sentence, ...],
) -> None:
    assert len({sentence.text for sentence in generated}) == 6000
    assert all(set(sentence.tags) >= SIX for sentence in generated)
    tasks = pos_tasks(generated)
    assert all(isinstance(task, PosTask) and len(task) == 6000 for task in tasks.values())


def test_more_sentences_than_the_default_are_distinct_too() -> None:
    many = generate_sentences(20_000, seed=1)
    assert len({sentence.text for sentence in many}) == 20_000


def test_generated_text_is_a_sentence_of_8_to_16_words(generated: tuple[Sentence, ...]) -> None:
    for sentence in generated:
        text = sentence.text
        assert re.fullmatch(r"[A-Z][A-Za-z]*(,? [A-Za-z]+)+\.", text), text
        assert 8 <= len(text.split()) <= 16, text
        assert sentence.words[-1] == "." and sentence.tags[-1] == "PUNCT"
        assert re.findall(r"\w+", text) == [word for word in sentence.words if word.isalpha()]


def test_no_word_form_has_two_tags(generated: tuple[Sentence, ...]) -> None:
    tags = defaultdict(set)
    for sentence in generated:
        for word, tag in zip(sentence.words, sentence.tags, strict=True):
            tags[word.lower()].add(tag)
    assert {word: found for word, found in tags.items() if len(found) > 1} == {}
    assert len(tags) > 500


def test_every_part_of_speech_comes_before_and_after_every_other(
    generated: tuple[Sentence, ...],
) -> None:
    for first, second in permutations(SIX, 2):
        before = sum(s.tags.index(first) < s.tags.index(second) for s in generated)
        assert before > 0.1 * len(generated), (first, second)


def test_no_position_holds_most_of_the_answers_of_a_task(generated: tuple[Sentence, ...]) -> None:
    for tag in SIX:
        positions = [sentence.tags.index(tag) for sentence in generated]
        commonest = max(positions.count(position) for position in set(positions))
        assert commonest < 0.5 * len(generated), tag


def test_the_six_answers_of_a_sentence_differ(generated: tuple[Sentence, ...]) -> None:
    for sentence in generated:
        assert len({sentence.first(tag) for tag in SIX}) == 6


def test_articles_agree_with_the_next_word(generated: tuple[Sentence, ...]) -> None:
    text = " ".join(sentence.text for sentence in generated)
    assert not re.findall(r"\b[Aa] (?=[aeio]|un|honest)\w+", text)
    assert not re.findall(r"\b[Aa]n (?![aeio]|un|honest)\w+", text)


def test_equal_arguments_give_equal_sentences() -> None:
    first = generate_sentences(50, seed=5)
    generate_sentences.cache_clear()
    assert generate_sentences(50, seed=5) == first
    assert generate_sentences(50, seed=6) != first
    assert generate_sentences(80, seed=5)[:50] == first


@pytest.mark.parametrize("n", [0, -3, 100_001])
def test_a_number_of_sentences_out_of_range_is_named(n: int) -> None:
    with pytest.raises(ValueError, match=f"n={n} sentences is out of range"):
        generate_sentences(n)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("He said : `` Wo n't you ? ''", 'He said: "Won\'t you?"'),
        ("It rose 5 % to $ 3 ( or more ) .", "It rose 5% to $3 (or more)."),
        ("the dogs ' owner -- she 's", "the dogs' owner -- she's"),
    ],
)
def test_detokenised_text_has_the_spaces_of_print(words: str, text: str) -> None:
    assert detokenise(words.split()) == text


# --- CoNLL-U ---


def row(identifier: str, form: str, tag: str, misc: str = "_") -> str:
    """Make a line of ten columns."""
    return f"{identifier}\t{form}\t_\t{tag}\t_\t_\t_\t_\t_\t{misc}"


def write(folder: Path, *lines: str) -> Path:
    """Write lines to a file of the folder."""
    path = folder / "sample.conllu"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_ranges_and_empty_nodes_are_no_words_of_their_own(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "# sent_id = 1",
        row("0.1", "hidden", "VERB"),
        row("1", "She", "PRON"),
        row("2-3", "didn't", "_"),
        row("2", "did", "AUX"),
        row("3", "n't", "PART"),
        row("4", "sing", "VERB", "SpaceAfter=No"),
        row("4.1", "sing", "VERB"),
        row("5", ".", "PUNCT"),
        "",
        "# text = Two  dogs!",
        row("1", "Two", "NUM"),
        row("2", "dogs", "NOUN"),
        row("3", "!", "PUNCT"),
    )
    first, second = load_conllu(path)
    assert first.words == ("She", "did", "n't", "sing", ".")
    assert first.tags == ("PRON", "AUX", "PART", "VERB", "PUNCT")
    assert first.text == "She didn't sing."
    assert second.text == "Two  dogs!"


def test_windows_line_ends_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    path = tmp_path / "sample.conllu"
    lines = ["# text = Hi", row("1", "Hi", "INTJ"), ""]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert load_conllu(str(path)) == [Sentence(("Hi",), ("INTJ",), "Hi")]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["1\tHi\t_\tINTJ"], "line 1: the line has 4 tab-separated columns; CoNLL-U has 10"),
        (["# text = Hi", "1 Hi"], "line 2: the line has 1 tab-separated columns"),
        ([row("x", "Hi", "INTJ")], "line 1: the line has the id 'x' where 1 is expected"),
        ([row("2", "Hi", "INTJ")], "line 1: the line has the id '2' where 1 is expected"),
        ([row("01", "Hi", "INTJ")], "the id '01' where 1 is expected"),
        (
            [row("9" * 5000, "Hi", "INTJ")],
            "line 1: the line has the id '9{40}' where 1 is expected",
        ),
        ([row("1", "a", "X"), row("3", "b", "X")], "line 2: .* id '3' where 2 is expected"),
        ([row("1", "a", "X"), row("1", "b", "X")], "line 2: .* id '1' where 2 is expected"),
        ([row("2-3", "ab", "_")], "line 1: .* id '2-3' where 1-N is expected"),
        ([row("1", "a", "X"), row("2-1", "b", "_")], "line 2: .* id '2-1' where 2-N is expected"),
        (
            [row("1", "a", "X"), row("2.1", "b", "_")],
            r"line 2: .* id '2\.1' where 1\.N is expected",
        ),
        ([row("1-2", "ab", "_"), row("1", "a", "X")], "line 2: .* ends .* range of words up to 2"),
        (
            [row("1-3", "ab", "_"), row("1", "a", "X"), row("2-3", "b", "_")],
            "line 3: .* id '2-3' where 2 is expected",
        ),
        ([row("1", " ", "X")], "line 1: the line has an empty form"),
        ([row("1", "dog", "NN")], "line 1: the line has the tag 'NN', which is none of the 17"),
        ([], "has no sentences"),
        (["# text = Hi", ""], "has no sentences"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, lines: list[str], message: str) -> None:
    path = write(tmp_path, *lines)
    with pytest.raises(ValueError, match=message) as error:
        load_conllu(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("load", [load_conllu, load_treebank])
def test_text_that_is_not_utf8_is_named(tmp_path: Path, load: object) -> None:
    assert callable(load)
    path = tmp_path / "latin.txt"
    path.write_bytes(b"\n\nCaf\xe9\n")
    with pytest.raises(ValueError, match=r"latin\.txt, line 3: the line is not UTF-8"):
        load(path)


@pytest.mark.parametrize("load", [load_conllu, load_treebank])
def test_an_endless_line_is_refused(tmp_path: Path, load: object) -> None:
    assert callable(load)
    path = tmp_path / "long.txt"
    path.write_bytes(b"\n" + b"#" * 1_000_001)
    with pytest.raises(ValueError, match=r"long\.txt, line 2: the line is longer than 1,000,000"):
        load(path)


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_conllu(tmp_path / "none.conllu")


# --- real data ---


def recount(path: Path) -> dict[str, dict[str, str]]:
    """Read, in the plainest way, text -> part of speech -> its first word."""
    found = {}
    for block in path.read_text(encoding="utf-8").split("\n\n"):
        lines = block.split("\n")
        text = next((line[9:] for line in lines if line.startswith("# text = ")), None)
        rows = [line.split("\t") for line in lines if re.match(r"\d+\t", line)]
        if text is not None:
            # Later lines first, so that the first word of each tag is what remains.
            found[text] = {columns[3]: columns[1] for columns in reversed(rows)}
    return found


def ewt_files() -> list[Path]:
    files = sorted(EWT.glob("*.conllu"))
    if not files:
        pytest.skip(f"no Universal Dependencies English EWT in {EWT}")
    return files


def test_the_english_web_treebank_has_522_sentences_with_all_six() -> None:
    sentences = [sentence for path in ewt_files() for sentence in load_conllu(path)]
    assert len(sentences) == 4078
    assert sum(set(sentence.tags) >= SIX for sentence in sentences) == 522


def test_tasks_of_the_english_web_treebank_agree_with_a_recount() -> None:
    files = ewt_files()
    tasks = pos_tasks([sentence for path in files for sentence in load_conllu(path)])
    counted = {text: firsts for path in files for text, firsts in recount(path).items()}
    texts = {text for text, firsts in counted.items() if set(firsts) >= SIX}
    # 520 distinct texts, of which seven have an answer inside of a longer word.
    assert len(texts) == 520
    for name, tag in POS_TAGS.items():
        examples = tasks[name].sample(513, random.Random(0))
        assert {example.x for example in examples} <= texts
        for example in examples:
            assert example.y == counted[example.x][tag]
            assert re.search(rf"(?<!\w){re.escape(example.y)}(?!\w)", example.x)


# --- Penn Treebank ---


def test_trees_give_words_universal_tags_and_text(tmp_path: Path) -> None:
    folder = tmp_path / "treebank" / "combined"
    folder.mkdir(parents=True)
    (folder / "wsj_0002.mrg").write_text(
        r"""
( (S (NP (PRP They) ) (VP (MD will) (RB n't) (VP (VB go) (PRT (RP up) ) (TO to)
   (NP (CD 1\/2) (NN mile) )))
   (-LRB- -LRB-) (IN because) (WP who) (RBR more) (JJR taller) (NNS dogs) (-RRB- -RRB-) (. .) ))
"""
    )
    (folder / "wsj_0001.mrg").write_text(
        "( (S (NP-SBJ (NP (DT the) (NN company) (POS 's) ) (JJ|NN past) ) (VP (VBD was)"
        " (NP (-NONE- *T*-1) )) (. .) ))\n( (S (UH Yes) ))"
    )
    (folder / "README").write_text("not a tree")
    past, yes, they = load_treebank(tmp_path / "treebank")
    assert past.text == "the company's past was."
    assert past.tags == ("DET", "NOUN", "PART", "ADJ", "VERB", "PUNCT")
    assert yes.words == ("Yes",)
    assert they.text == "They willn't go up to 1/2 mile (because who more taller dogs)."
    assert " ".join(they.tags) == (
        "PRON AUX ADV VERB ADP PART NUM NOUN PUNCT ADP PRON ADV ADJ NOUN PUNCT PUNCT"
    )


def test_deep_brackets_need_no_recursion(tmp_path: Path) -> None:
    path = tmp_path / "deep.mrg"
    path.write_text("(S " * 50_000 + "(NN dog)" + ")" * 50_000)
    assert load_treebank(path) == [Sentence(("dog",), ("NOUN",), "dog")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(S (NN dog)\n", "line 1: the line opens a bracket that is never closed"),
        ("(NN dog)\n)", "line 2: the line closes a bracket that was never opened"),
        ("\ndog", "line 2: the line has 'dog' outside all brackets"),
        ("(NN big dog)", "line 1: the line has 'dog' where a bracket is expected"),
        ("(S (NN dog) dog)", "line 1: the line has 'dog' where a bracket is expected"),
        ("(NN dog (NN dog))", "line 1: the line opens a bracket after the word 'dog'"),
        ("(S (NP))", "line 1: the line closes a bracket without a word after 'NP'"),
        ("(S ())", "line 1: the line closes a bracket without a word after None"),
        ("(S\n(NOUN dog))", "line 2: the line has the tag 'NOUN', which is not a Penn"),
        ("", "has no sentences"),
        ("( (S (-NONE- *) ))", "has no sentences"),
    ],
)
def test_a_malformed_tree_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.mrg"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_treebank(path)
    assert str(path) in str(error.value)


def test_a_directory_without_trees_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no \.mrg files"):
        load_treebank(tmp_path)
