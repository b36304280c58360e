from __future__ import annotations

import hashlib
import random
import warnings
from collections import Counter
from dataclasses import dataclass

import pytest

import transformer_lens_taskvec as tv
from transformer_lens_taskvec.prompts import demo_sets_of

WORDS = {f"in{i}": f"out{i}" for i in range(12)}


def test_a_prompt_is_its_instruction_demonstrations_and_query() -> None:
    template = tv.PromptTemplate("Q: {x}\nA: {y}", separator="\n\n", instruction="Do {task}.")
    demos = (tv.Example("1", "one"), tv.Example("2", "two"))
    episode = tv.Episode("numbers", demos, tv.Example("3", "three"), template)
    assert episode.prompt == "Do numbers.\n\nQ: 1\nA: one\n\nQ: 2\nA: two\n\nQ: 3\nA:"
    assert episode.answer == " three"
    assert episode.prompt + episode.answer == (
        template.render(demos, "3", "numbers") + template.answer("3", "three")
    )


def test_inputs_with_braces_stay_as_they_are() -> None:
    episode = tv.Episode("t", (tv.Example("{y}", "{x}"),), tv.Example("{x}{y}", "{z}"))
    assert episode.prompt == "example:{y}->{x}\nexample:{x}{y}->"
    assert episode.answer == "{z}"


@pytest.mark.parametrize("pattern", ["{x}", "{y}", "{y} from {x}", "{x}{y}{y}"])
def test_a_template_without_x_and_then_y_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="must contain {x} and then {y}"):
        tv.PromptTemplate(pattern)


def test_a_query_that_is_not_the_beginning_of_the_example_is_refused() -> None:
    with pytest.raises(ValueError, match="beginning of the example"):
        tv.PromptTemplate("{x}->{y}", query="{x}=>")


@pytest.mark.filterwarnings("ignore:.*distinct inputs")
def test_the_query_is_never_among_the_demonstrations() -> None:
    task = tv.mapping_task("t", WORDS)
    for episode in tv.sample_episodes([task], n=50, n_shots=11, seed=3):
        inputs = [demo.x for demo in episode.demos]
        assert len(set(inputs)) == 11
        assert episode.query.x not in inputs


def test_the_same_seed_gives_the_same_episodes_and_another_task_changes_none() -> None:
    task, other = tv.mapping_task("t", WORDS), tv.mapping_task("o", WORDS)
    first = tv.sample_episodes([task], n=6, n_shots=2, seed=0)
    assert tv.sample_episodes([task], n=6, n_shots=2, seed=0) == first
    assert tv.sample_episodes([other, task], n=6, n_shots=2, seed=0)[6:] == first
    assert tv.sample_episodes([task], n=6, n_shots=2, seed=1) != first


def test_queries_are_distinct_while_the_task_has_enough() -> None:
    task = tv.mapping_task("t", WORDS)
    queries = [e.query.x for e in tv.sample_episodes([task], n=12, n_shots=1, seed=0)]
    assert sorted(queries) == sorted(WORDS)


def test_more_episodes_than_inputs_are_warned_of_once_with_both_numbers() -> None:
    few, many = tv.mapping_task("few", WORDS), tv.mapping_task("many", {**WORDS, "a": "b"})
    with pytest.warns(UserWarning) as caught:
        episodes = tv.sample_episodes([few, many], n=13, n_shots=1, seed=0)
    assert len(caught) == 1
    assert "13 episodes of each task" in str(caught[0].message)
    assert "'few' has 12 distinct inputs" in str(caught[0].message)
    assert len({episode.query_id for episode in episodes}) == 25
    with pytest.warns(UserWarning, match="27 episodes .*'few' has 12, 'many' has 13"):
        tv.sample_splits([few, many], {"train": 13, "test": 14}, n_shots=1, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tv.sample_episodes([few, many], n=12, n_shots=1, seed=0)


@pytest.mark.filterwarnings("ignore:.*distinct inputs")
@pytest.mark.parametrize("n", [2, 4, 40])
def test_no_query_of_one_set_is_a_query_of_another(n: int) -> None:
    task = tv.mapping_task("t", WORDS)
    sets = tv.sample_splits([task], {"train": n, "dev": n, "test": 2 * n}, n_shots=3, seed=0)
    queries = {name: {e.query.x for e in episodes} for name, episodes in sets.items()}
    assert [len(episodes) for episodes in sets.values()] == [n, n, 2 * n]
    assert sum(map(len, queries.values())) == len(set().union(*queries.values()))


def test_zero_shot_keeps_the_queries() -> None:
    episodes = tv.sample_episodes([tv.mapping_task("t", WORDS)], n=3, n_shots=2, seed=0)
    bare = tv.zero_shot(episodes)
    assert [e.query for e in bare] == [e.query for e in episodes]
    assert all(e.n_shots == 0 and e.prompt == f"example:{e.query.x}->" for e in bare)


def test_more_shots_than_the_task_can_give_are_refused() -> None:
    with pytest.raises(ValueError, match=r"task 't' has 12 distinct inputs.*at most n_shots=11"):
        tv.sample_episodes([tv.mapping_task("t", WORDS)], n=1, n_shots=12, seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": [], "n": 1, "n_shots": 1}, "tasks is empty"),
        ({"n": 0, "n_shots": 1}, "n is 0"),
        ({"n": 1, "n_shots": -1}, "n_shots is -1"),
    ],
)
def test_requests_out_of_range_are_refused(arguments: dict, message: str) -> None:
    tasks = arguments.pop("tasks", [tv.mapping_task("t", WORDS)])
    with pytest.raises(ValueError, match=message):
        tv.sample_episodes(tasks, seed=0, **arguments)


def test_two_tasks_of_one_name_are_refused() -> None:
    task = tv.mapping_task("t", WORDS)
    with pytest.raises(ValueError, match="distinct names"):
        tv.sample_episodes([task, task], n=1, n_shots=1, seed=0)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [({}, "no pairs"), ({"a": " "}, "empty"), ([("a", "b"), ("a", "c")], "'a' twice")],
)
def test_a_task_without_usable_pairs_is_refused(pairs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tv.mapping_task("t", pairs)


def test_an_unknown_task_is_answered_with_near_names() -> None:
    with pytest.raises(ValueError, match=r"'anotnyms'; did you mean antonyms"):
        tv.find_tasks(["anotnyms"])


@dataclass(frozen=True)
class Repeating:
    """A task that breaks its contract: it draws with replacement, or gives too few."""

    inputs: int
    short: int = 0
    name: str = "repeating"

    def sample(self, n: int, rng: random.Random) -> list[tv.Example]:
        drawn = [rng.randrange(self.inputs) for _ in range(n - self.short)]
        return [tv.Example(f"in{i}", f"out{i}") for i in drawn]


def test_a_task_that_repeats_its_inputs_is_refused_with_both_numbers() -> None:
    message = r"asked for 40 examples with distinct inputs and gave 40 with \d+ distinct inputs"
    with pytest.raises(ValueError, match=message):  # train and test would share queries
        tv.sample_splits([Repeating(30)], {"train": 20, "test": 20}, n_shots=1, seed=0)
    message = r"asked for 9 examples with distinct inputs and gave 9 with \d distinct inputs"
    with pytest.raises(ValueError, match=message):  # the demonstrations would be too few
        tv.sample_episodes([Repeating(10)], n=1, n_shots=8, seed=0)
    with pytest.raises(ValueError, match="asked for 3 examples .* gave 2 with 2"):
        tv.sample_episodes([Repeating(10**9, short=1)], n=3, n_shots=2, seed=0)


@pytest.mark.parametrize("name", list(tv.tasks.all_tasks()))
def test_built_in_tasks_give_the_shots_asked_for(name: str) -> None:
    for episode in tv.sample_episodes(tv.find_tasks([name]), n=6, n_shots=4, seed=0):
        assert len({episode.query.x, *(demo.x for demo in episode.demos)}) == 5


@pytest.mark.parametrize("same", [1, 2, 4, 5, 8])
def test_shuffled_answers_do_not_stay_where_an_equal_one_was(same: int) -> None:
    ys = ["yes"] * same + [f"no{i}" for i in range(8 - same)]
    for seed in range(30):
        order = random.Random(seed).sample(ys, 8)
        demos = tuple(tv.Example(str(i), y) for i, y in enumerate(order))
        episode = tv.Episode("t", demos, tv.Example("q", "a"))
        [shuffled] = tv.shuffle_labels([episode], seed)
        found = [demo.y for demo in shuffled.demos]
        assert sorted(found) == sorted(order)
        kept = sum(one == other for one, other in zip(found, order, strict=True))
        assert kept == max(0, 2 * same - 8)  # no more than must stay


MANY = {f"in{i}": f"out{i}" for i in range(300)}


@pytest.mark.parametrize(("n", "demo_sets"), [(40, 8), (43, 10), (20, 20), (25, 24)])
def test_queries_are_spread_evenly_over_different_sets_of_demonstrations(
    n: int, demo_sets: int
) -> None:
    task = tv.mapping_task("t", MANY)
    episodes = tv.sample_episodes([task], n, 5, seed=0, demo_sets=demo_sets)
    of_set: dict[int | None, list[tv.Episode]] = {}
    for episode in episodes:
        of_set.setdefault(episode.demo_set, []).append(episode)
    assert None not in of_set and len(of_set) == demo_sets
    sizes = [len(some) for some in of_set.values()]
    assert max(sizes) - min(sizes) <= 1 and sum(sizes) == n
    assert len({some[0].demos for some in of_set.values()}) == demo_sets
    for some in of_set.values():
        assert len({episode.demos for episode in some}) == 1
        shared = some[0].prompt[: -len(f"example:{some[0].query.x}->")]
        assert all(episode.prompt.startswith(shared) for episode in some)
        demonstrated = {demo.x for demo in some[0].demos}
        assert len(demonstrated) == 5
        assert not demonstrated & {episode.query.x for episode in some}
    fresh = tv.sample_episodes([task], n, 5, seed=0)
    assert [e.query for e in episodes] == [e.query for e in fresh]
    assert {e.demo_set for e in fresh} == {None} and len({e.demos for e in fresh}) == n
    assert tv.sample_episodes([task], n, 5, seed=0, demo_sets=demo_sets) == episodes


def test_a_seed_gives_the_episodes_that_it_has_always_given() -> None:
    tasks = tv.find_tasks(["upper_case", "next_letter"])
    sizes = {"train": 8, "test": 8}
    sets = tv.sample_splits(tasks, sizes, 3, seed=5)
    texts = [episode.prompt for name in sizes for episode in sets[name]]
    assert hashlib.sha256("|".join(texts).encode()).hexdigest()[:16] == "62fc3043665d238a"


@pytest.mark.filterwarnings("ignore:.*distinct inputs")
def test_only_the_splits_that_are_named_share_demonstrations() -> None:
    tasks, sizes = tv.find_tasks(["next_letter", "upper_case"]), {"train": 40, "dev": 9, "test": 40}
    fresh = tv.sample_splits(tasks, sizes, 8, seed=0)
    sets = tv.sample_splits(tasks, sizes, 8, seed=0, demo_sets={"dev": None, "test": 10})
    assert sets["train"] == fresh["train"] and sets["dev"] == fresh["dev"]
    for task in tasks:
        assert len({e.demo_set for e in sets["test"] if e.task == task}) == 10
    assert {e.demo_set for e in sets["train"]} == {None}
    every = tv.sample_splits(tasks, sizes, 8, seed=0, demo_sets=8)
    assert all(len({e.demo_set for e in some}) == 16 for some in every.values())


@pytest.mark.filterwarnings("ignore:.*distinct inputs")
def test_a_query_that_repeats_meets_every_set_before_it_meets_one_again() -> None:
    [task] = tv.find_tasks(["next_letter"]).values()
    for n, demo_sets in ((200, 20), (100, 10), (125, 25)):
        episodes = tv.sample_episodes([task], n, 8, seed=1, demo_sets=demo_sets)
        assert len({(e.query, e.demo_set) for e in episodes}) == n
        sizes = Counter(e.demo_set for e in episodes).values()
        assert max(sizes) - min(sizes) <= 1
        assert all(e.query not in e.demos for e in episodes)


def test_the_demonstrations_of_shared_sets_favour_no_input() -> None:
    pairs = dict([*MANY.items()][:12])
    task, with_query = tv.mapping_task("t", pairs), Counter[tuple[str, str]]()
    for seed in range(1_000):
        for episode in tv.sample_episodes([task], 12, 4, seed, demo_sets=8):
            with_query.update((episode.query.x, demo.x) for demo in episode.demos)
    counts = [with_query[x, y] for x in pairs for y in pairs if x != y]
    assert len(with_query) == len(counts) == 12 * 11  # every other input, 4 / 11 of the time
    assert max(abs(count / 1_000 - 4 / 11) for count in counts) < 0.07


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 10, "n_shots": 2, "demo_sets": 11}, "demo_sets is 11 for 10 episodes"),
        ({"n": 10, "n_shots": 2, "demo_sets": 0}, "demo_sets is 0 .* or None for fresh"),
        ({"n": 10, "n_shots": 0, "demo_sets": 8}, "n_shots is 0, so there are no demonstrations"),
        ({"n": 12, "n_shots": 11, "demo_sets": 8}, "12 .*too few for n_shots=11 .*the 2 queries"),
        ({"n": 24, "n_shots": 1, "demo_sets": 24}, r"1[12] different sets of 1 demonstration\(s\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*distinct inputs")
def test_sets_that_a_task_cannot_give_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tv.sample_episodes([tv.mapping_task("t", WORDS)], seed=0, **arguments)


def test_sets_of_unknown_splits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"demo_sets names \['dev'\]; .* \['train', 'test'\]"):
        tv.sample_splits(
            [tv.mapping_task("t", WORDS)], {"train": 4, "test": 4}, 2, 0, demo_sets={"dev": 8}
        )


def test_fewer_than_eight_sets_are_warned_of_once() -> None:
    tasks = [tv.mapping_task(name, MANY) for name in "ab"]
    with pytest.warns(UserWarning) as caught:
        tv.sample_episodes(tasks, 20, 2, seed=0, demo_sets=5)
    assert len(caught) == 1 and "demo_sets is 5" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tv.sample_episodes(tasks, 20, 2, seed=0, demo_sets=8)


def test_versions_of_shared_episodes_still_share_what_they_have_of_demonstrations() -> None:
    episodes = tv.sample_episodes([tv.mapping_task("t", MANY)], 24, 5, seed=0, demo_sets=8)
    sets = [episode.demo_set for episode in episodes]
    shuffled = tv.shuffle_labels(episodes, seed=1)
    assert [episode.demo_set for episode in shuffled] == sets
    assert len({episode.demos for episode in shuffled}) == 8
    for one, other in zip(episodes, shuffled, strict=True):
        assert all(a.x == b.x and a.y != b.y for a, b in zip(one.demos, other.demos, strict=True))
    told = tv.with_instructions(episodes, {"t": "Count."})
    assert [episode.demo_set for episode in told] == sets
    assert {episode.demo_set for episode in tv.zero_shot(episodes)} == {None}


def test_an_episode_with_fresh_demonstrations_is_a_set_of_its_own_among_shared_ones() -> None:
    task = tv.mapping_task("t", MANY)
    shared = tv.sample_episodes([task], 16, 2, seed=0, demo_sets=8)
    fresh = tv.sample_episodes([task], 3, 2, seed=1)
    assert demo_sets_of(fresh) is None
    assert len(demo_sets_of([*shared, *fresh]).unique()) == 8 + 3
