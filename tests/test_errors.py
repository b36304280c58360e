"""What a model answered: the kept answers are those it generates, and errors fall in their kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from typer.testing import CliRunner

import transformer_lens_taskvec as tv
from transformer_lens_taskvec import lab
from transformer_lens_taskvec._utils.errors import KINDS, Reply, reply_to
from transformer_lens_taskvec.cli import app
from transformer_lens_taskvec.models.counted import Tallied
from transformer_lens_taskvec.scoring import with_texts

OPERATIONS = tv.bitwise_tasks(null=False)


@pytest.fixture(scope="module")
def toy() -> Any:
    return tv.load_model("toy")


@pytest.fixture(scope="module")
def sets() -> dict[str, list[tv.Episode]]:
    return tv.sample_splits(OPERATIONS, {"train": 20, "test": 20}, n_shots=4, seed=3)


@pytest.fixture(scope="module")
def toy_vectors(toy: Any, sets: dict[str, list[tv.Episode]]) -> tv.TaskVectors:
    return tv.task_vectors(tv.collect(toy, sets["train"]))


def scores_of(replies: list[Reply], correct: list[bool], names: list[str]) -> tv.Scores:
    tasks = tuple(dict.fromkeys(names))
    right, labels = torch.tensor(correct), torch.tensor([tasks.index(name) for name in names])
    queries = torch.tensor([hash((n, r.query)) for n, r in zip(names, replies, strict=True)])
    return tv.Scores(
        {"correct": right, "loss": right.float()}, labels, tasks, queries, replies=tuple(replies)
    )


def generated(model: Any, episodes: list[tv.Episode], edits: Any, n: int = 12) -> list[str]:
    """Each episode's answer, generated alone and without a cache."""
    texts = [
        tv.generate(
            model, [one], edits(one.task), max_new_tokens=n, stop=one.separator, use_cache=False
        )[0]
        for one in episodes
    ]
    return [text.strip() for text in texts]


@pytest.mark.model
@pytest.mark.filterwarnings("ignore:.*one intervention at a time")
@pytest.mark.parametrize("stop", [None, "separator"])
def test_the_kept_answers_are_those_that_the_model_generates(
    model: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors, stop: str | None
) -> None:
    before_all = {"position": (-2, -1)}  # is not packed

    def edits(task: str) -> list[list[Any]]:
        return [[], vectors.inject(task, 1, scale=3.0), [tv.ablate(1, **before_all)]]

    found = tv.evaluate_many(model, episodes, edits, stop=stop, keep_text=True)
    plain = tv.evaluate_many(model, episodes, edits, stop=stop)
    differ = set()
    for index, scores in enumerate(found):
        assert scores.correct.equal(plain[index].correct) and plain[index].texts is None
        assert scores.loss.equal(plain[index].loss)
        assert scores.texts is not None
        some = episodes[index::4]
        alone = generated(model, some, lambda task, index=index: edits(task)[index])
        kept = zip(scores.texts[index::4], alone, scores.correct[index::4], strict=True)
        for episode, (text, whole, right) in zip(some, kept, strict=True):
            if right:
                assert text == episode.query.y
            else:  # a random model never comes to the separator, so the answer is cut off
                assert text and whole.startswith(text)
        differ.add(scores.texts)
    assert len(differ) == 3


@pytest.mark.model
def test_answers_are_kept_under_hooks_and_functions(
    model: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors
) -> None:
    (edit,) = vectors.inject("en_fr", 1, scale=3.0, position=None)

    def everywhere(activation: torch.Tensor, hook: Any = None) -> torch.Tensor:
        return activation + 1.0

    some = [one for one in episodes if one.n_shots == 2]
    given = tv.evaluate(model, some, [(edit.name, everywhere)], keep_text=True)
    plain = tv.evaluate(model, some, keep_text=True)
    with model.hooks(fwd_hooks=[(edit.name, everywhere)]), pytest.warns(UserWarning) as said:
        hooked = tv.evaluate(model, some, keep_text=True)
    assert hooked.texts == given.texts != plain.texts
    assert len([one for one in said if "carries hooks" in str(one.message)]) == 1


def test_right_answers_need_no_generation(
    toy: Any, sets: dict[str, list[tv.Episode]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = tv.scoring.answers

    def counting(model: Any, prompts: list[Any], *args: Any, **kwargs: Any) -> Any:
        asked.append(len(prompts))
        return real(model, prompts, *args, **kwargs)

    monkeypatch.setattr(tv.scoring, "answers", counting)
    scores = tv.evaluate(toy, sets["test"], keep_text=True)
    assert sum(asked) == int((~scores.correct).sum()) < 10
    asked.clear()
    query = tv.zero_shot(sets["test"])[:1] * 5
    assert not tv.evaluate(toy, query, keep_text=True).correct.any() and asked == [1]


def test_under_another_tasks_vector_the_errors_are_its_answers(
    toy: Any, sets: dict[str, list[tv.Episode]], toy_vectors: tv.TaskVectors
) -> None:
    xor = [one for one in tv.zero_shot(sets["test"]) if one.task == "XOR"]
    scores = tv.evaluate(toy, xor, toy_vectors.inject("OR", 1), keep_text=True)
    assert scores.texts == tuple(generated(toy, xor, lambda _: toy_vectors.inject("OR", 1)))
    ours = []
    for episode, text in zip(xor, scores.texts, strict=True):
        a, b = (int(number, 2) for number in episode.query.x.split())
        ours.append(text == f"{a | b:05b}" != episode.query.y)
    errors = scores.errors(tasks=OPERATIONS)
    theirs = [
        kind == "another task's answer" and "OR" in other
        for kind, other in zip(errors.kinds, errors.others, strict=True)
    ]
    assert ours == theirs and sum(ours) > 12
    row = errors.to_frame().set_index("kind").loc["another task's answer"]
    assert row.mostly == "OR" and row.n >= sum(ours) and row.low < row.share < row.high
    # Without knowledge of the other tasks they are other outputs of this one.
    alone = scores.errors()
    assert "another task's answer" not in alone.kinds and "wrong item" in alone.kinds


def test_with_its_own_vector_a_task_has_few_errors_and_unedited_the_toy_model_has_many(
    toy: Any, sets: dict[str, list[tv.Episode]], toy_vectors: tv.TaskVectors
) -> None:
    queries = tv.zero_shot(sets["test"])
    plain, own = tv.evaluate_many(
        toy, queries, lambda task: [[], toy_vectors.inject(task, 1)], keep_text=True
    )
    for scores in (plain, own):
        shares = scores.errors(tasks=OPERATIONS).shares
        for task, accuracy in scores.by_task().items():
            assert shares.loc[task].sum() + accuracy == pytest.approx(1)
    assert float(own.errors().shares.sum().sum()) < 0.3 * float(plain.errors().shares.sum().sum())


def test_kinds_are_told_apart_and_tried_in_their_order() -> None:
    demos = (("sun", "suns"), ("mop", "mops"))
    upper = tv.mapping_task("upper_case", {"cat": "CAT", "dog": "DOG", "sun": "suns"})
    texts = ["cats", "cats!", "cat", "CAT", "suns", "foxes", "cat's", "catsup", "", "CATS", "mops"]
    expected = [
        "",
        "right text",
        "the query",
        "another task's answer",
        "a demonstration's answer",
        "wrong item",
        "the query",
        "none of these",
        "none of these",
        "none of these",
        "a demonstration's answer",
    ]
    replies = [Reply("cat", "cats", text, demos) for text in texts]
    replies.append(Reply("fox", "foxes", "DOG", ()))
    right = [True, *[False] * 11]
    errors = scores_of(replies, right, ["plural"] * 12).errors(tasks=[upper])
    assert errors.kinds == (*expected, "none of these")  # DOG is not what fox would be
    assert [one for one in errors.others if one] == [("upper_case",)]
    assert set(errors.kinds) - {""} == set(KINDS)
    copies = Reply("sun", "x", "suns", (("a", "suns"),))
    kinds = scores_of([copies], [False], ["plural"]).errors(tasks={"u": upper}).kinds
    assert kinds == ("another task's answer",)


def test_other_tasks_of_the_same_scores_are_known() -> None:
    replies = [Reply("cat", "cats", "chat"), Reply("cat", "chat", "cats")]
    errors = scores_of(replies, [False, False], ["plural", "en_fr"]).errors()
    assert errors.others == (("en_fr",), ("plural",))


def test_shares_are_over_distinct_queries() -> None:
    replies = [Reply("a", "1", "a")] * 3 + [Reply("b", "2", "x"), Reply("c", "3", "3")]
    scores = scores_of(replies, [False] * 4 + [True], ["t"] * 5)
    table = scores.errors().to_frame().set_index("kind")
    assert table.n.to_dict() == {"the query": 3, "none of these": 1}
    assert table.share.to_dict() == pytest.approx({"the query": 1 / 3, "none of these": 1 / 3})
    assert table.examples["the query"] == "'a' -> 'a'"


def test_what_selects_scores_keeps_their_answers() -> None:
    replies = [Reply(str(i), str(-i), f"text {i}") for i in range(6)]
    scores = scores_of(replies, [False, True] * 3, ["a", "b", "a", "b", "a", "b"])
    assert scores.of("b").texts == ("text 1", "text 3", "text 5")
    assert scores.select(torch.tensor([4, 0])).texts == ("text 4", "text 0")
    assert scores.select(torch.tensor([-1])).texts == ("text 5",)
    mask = torch.tensor([False, True, True, False, False, False])
    assert scores.select(mask).texts == ("text 1", "text 2")
    frame = scores.of("b").to_frame()
    assert frame.text.tolist() == ["text 1", "text 3", "text 5"]
    assert frame.input.tolist() == ["1", "3", "5"] and frame.answer.tolist() == ["-1", "-3", "-5"]


def test_a_layer_of_a_sweep_has_no_answers_of_another(
    toy: Any, sets: dict[str, list[tv.Episode]], toy_vectors: tv.TaskVectors
) -> None:
    queries = tv.zero_shot(sets["test"])[:40]
    sweep = tv.layer_sweep(toy, queries, toy_vectors)
    object.__setattr__(sweep, "baseline", with_texts(toy, queries, sweep.baseline))
    assert sweep.baseline.texts is not None and sweep.scores_at(1).texts is None


@pytest.mark.model
def test_what_the_template_puts_around_an_output_is_no_part_of_the_answer(tokenizer: Any) -> None:
    template = tv.PromptTemplate("<{x}> = <{y}>", query="<{x}> =", separator=";")
    episode = tv.Episode("t", (), tv.Example("cat", "cats"), template)
    reply = reply_to(episode, " <cat> ")
    assert reply.text == "cat" and reply_to(episode, episode.answer).text == "cats"
    chat = tv.PromptTemplate.chat(tokenizer)
    assert "<|im_end|>" in chat.separator
    some = [tv.Episode("t", (), tv.Example(x, "?"), chat) for x in ("cat", "dog")]
    model = zoo.bridge("llama", tokenizer)
    scores = tv.evaluate(model, some, keep_text=True)
    alone = generated(model, some, lambda _: [])
    for text, whole in zip(scores.texts, alone, strict=True):
        assert whole.startswith(text.partition("\n")[0])


def test_errors_of_scores_without_answers_and_answers_that_are_numbers_are_refused(
    toy: Any, sets: dict[str, list[tv.Episode]]
) -> None:
    with pytest.raises(ValueError, match="keep_text=True"):
        tv.evaluate(toy, sets["test"][:2]).errors()
    other = lab.problem_episodes(lab.SparseLinearMixture.small(), n=1)
    with pytest.raises(ValueError, match="LabEpisode has none"):
        tv.evaluate(toy, other, keep_text=True)
    scores = tv.evaluate(toy, sets["test"][:2])
    with pytest.raises(ValueError, match="of other episodes"):
        with_texts(toy, sets["test"][2:4], scores)


def test_an_answer_is_cut_off_where_the_model_ends(tokenizer: Any) -> None:
    model = zoo.bridge("gpt2", tokenizer)
    template = tv.PromptTemplate("{x} {y}")
    episode = tv.Episode("t", (), tv.Example("a" + " a" * 254, "bee"), template)
    ids = tokenizer(episode.prompt, add_special_tokens=False)["input_ids"]
    assert len(ids) == 255  # the model takes 256
    scores = tv.evaluate(model, [episode], keep_text=True)
    assert scores.texts is not None


def test_a_plan_with_texts_counts_the_most_that_it_can_take(
    toy: Any, sets: dict[str, list[tv.Episode]], toy_vectors: tv.TaskVectors
) -> None:
    queries, variants = tv.zero_shot(sets["test"]), [[], toy_vectors.inject("OR", 1)]
    without = tv.plan(toy, queries, variants, tokens_per_second=1e3)
    plan = tv.plan(toy, queries, variants, keep_text=True, tokens_per_second=1e3)
    ran = []
    for keep_text in (False, True):
        tallied = Tallied(toy)
        tv.evaluate_many(tallied, queries, variants, keep_text=keep_text)
        ran.append(tallied.tokens)
    assert 0 < ran[1] - ran[0] <= plan.tokens - without.tokens


def test_the_demo_reports_errors_next_to_accuracies(tmp_path: Path) -> None:
    tasks = "XOR,OR"
    options = ["run", "--model", "toy", "--tasks", tasks, "--shots", "4", "--n", "10"]
    result = CliRunner().invoke(app, [*options, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "wrong answers with each task's vector, by kind:" in result.output
    written = json.loads((tmp_path / "results.json").read_text())
    for task in ("XOR", "OR"):
        shares = [row["share"] for row in written["errors"] if row["task"] == task]
        accuracy = written["tasks"][task]["injected"]
        assert sum(shares) + accuracy == pytest.approx(1, abs=1e-6)
    said = CliRunner().invoke(app, [*options, "--out", str(tmp_path), "--dry-run"])
    assert "as if all of them were wrong" in said.output


def test_texts_are_those_of_interventions_at_every_position(
    toy: Any, sets: dict[str, list[tv.Episode]]
) -> None:
    edit = tv.inject(torch.ones(64), 2, mode="add", scale=0.5, position=None)
    scores = tv.evaluate(toy, tv.zero_shot(sets["test"]), [edit], keep_text=True)
    answers = [episode.answer for episode in sets["test"]]
    assert scores.texts is not None and 0 < scores.accuracy < 1
    for text, answer, right in zip(scores.texts, answers, scores.correct.tolist(), strict=True):
        assert (text == answer) == right
