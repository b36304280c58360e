"""Progressive in-context learning, against plain passes and against its own generation."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch

import transformer_lens_taskvec as tv
from transformer_lens_taskvec._utils.statistics import paired_interval
from transformer_lens_taskvec.analysis.progressive import (
    ALL,
    ProgressiveIcl,
    progressive_generate,
    progressive_icl,
)
from transformer_lens_taskvec.models.counted import Tallied
from transformer_lens_taskvec.models.tokens import Separator
from transformer_lens_taskvec.plots.fidelity import plot_progressive

pytestmark = pytest.mark.filterwarnings("ignore:.*one intervention at a time")
KS = (0, 1, 2, 4, 5, 8)


@pytest.fixture(scope="module")
def toy() -> Any:
    return tv.load_model("toy")


@pytest.fixture(scope="module")
def sets() -> dict[str, list[tv.Episode]]:
    tasks = tv.find_tasks(["XOR", "OR"])
    return tv.sample_splits(tasks, {"train": 12, "test": 10}, n_shots=4, seed=0)


@pytest.fixture(scope="module")
def toy_vectors(toy: Any, sets: dict[str, list[tv.Episode]]) -> tv.TaskVectors:
    return tv.task_vectors(tv.collect(toy, sets["train"]))


@pytest.fixture(scope="module")
def found(
    toy: Any, sets: dict[str, list[tv.Episode]], toy_vectors: tv.TaskVectors
) -> ProgressiveIcl:
    return progressive_icl(toy, sets["test"], vectors=toy_vectors, layer=1, ks=KS)


def greedy(model: Any, ids: list[int], n: int, hooks: list[Any]) -> list[int]:
    said: list[int] = []
    for _ in range(n):
        with torch.no_grad():
            logits = model.run_with_hooks(torch.tensor([ids + said]), fwd_hooks=hooks)
        said.append(int(logits[0, -1].argmax()))
    return said


@pytest.mark.model
@pytest.mark.parametrize("k", [0, 2, 5])
def test_generation_is_two_stages_of_plain_greedy_passes(
    model: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors, k: int
) -> None:
    some, layer, n = episodes[::3], vectors.layers[1], 5
    hooked = progressive_generate(
        model, some, lambda task: [[], vectors.inject(task, layer)], k=k, max_new_tokens=n
    )
    for row, episode in enumerate(some):
        encode = model.tokenizer.encode
        [zero] = tv.zero_shot([episode])
        long, short = (encode(one.prompt, add_special_tokens=False) for one in (episode, zero))
        first = greedy(model, long, k, [])

        def put(resid: torch.Tensor, hook: Any) -> torch.Tensor:
            edited = resid.clone()
            edited[:, len(short) - 1] = vectors[episode.task, layer]  # noqa: B023
            return edited

        for texts, hooks in zip(
            hooked, ([], [(f"blocks.{layer}.hook_resid_post", put)]), strict=True
        ):
            said = first + greedy(model, short + first, n - k, hooks)
            assert texts[row] == tv.models.tokens.decode(model, said)


@pytest.mark.parametrize("k", KS)
def test_answers_are_right_where_generation_gives_them(
    toy: Any,
    sets: dict[str, list[tv.Episode]],
    toy_vectors: tv.TaskVectors,
    found: ProgressiveIcl,
    k: int,
) -> None:
    texts = progressive_generate(
        toy,
        sets["test"],
        lambda task: [[], toy_vectors.inject(task, 1)],
        k=k,
        max_new_tokens=8,
        stop="\n",
    )
    for name, said in zip(("zero-shot", "task vector"), texts, strict=True):
        scores = found.scores[name][KS.index(k)]
        right = [text == one.answer for text, one in zip(said, sets["test"], strict=True)]
        assert right == scores.correct.tolist()
        if k == 1 and name == "zero-shot":
            assert 0 < sum(right) < len(right)


def test_no_and_all_tokens_are_the_two_prompts_own_scores(
    toy: Any,
    sets: dict[str, list[tv.Episode]],
    toy_vectors: tv.TaskVectors,
    found: ProgressiveIcl,
) -> None:
    few = tv.evaluate(toy, sets["test"])
    alone = tv.evaluate_many(
        toy, tv.zero_shot(sets["test"]), lambda task: [[], toy_vectors.inject(task, 1)]
    )
    for name, own in zip(("zero-shot", "task vector"), alone, strict=True):
        torch.testing.assert_close(found.scores[name][0].loss, own.loss)
        assert found.scores[name][0].correct.equal(own.correct)
        for at in (KS.index(5), KS.index(8)):
            torch.testing.assert_close(found.scores[name][at].loss, few.loss)
            assert found.scores[name][at].correct.equal(few.correct)


@pytest.mark.parametrize("k", KS)
def test_tokens_are_those_that_the_model_runs(
    toy: Any, sets: dict[str, list[tv.Episode]], found: ProgressiveIcl, k: int
) -> None:
    counted = Tallied(toy)
    progressive_generate(counted, sets["test"][:1], k=min(k, 5), max_new_tokens=5)
    assert counted.tokens == int(found.costs["tokens"][KS.index(k), 0])
    counted = Tallied(toy)
    tv.generate(counted, sets["test"][:1], max_new_tokens=5)
    assert counted.tokens == int(found.few_shot_costs["tokens"][0])
    counted = Tallied(toy)
    tv.generate(counted, sets["test"][:1], max_new_tokens=5, use_cache=False)
    assert counted.tokens == int(found.few_shot_costs["tokens_uncached"][0])
    long, short = (
        len(toy.tokenizer(one.prompt)["input_ids"])
        for one in (sets["test"][0], tv.zero_shot(sets["test"])[0])
    )
    begun = [long + t for t in range(min(k, 5))]
    ended = [short + t for t in range(min(k, 5), 5)]
    assert sum(begun + ended) == int(found.costs["tokens_uncached"][KS.index(k), 0])
    pairs = sum(sum(range(1, one[-1] + 1)) for one in (begun, ended) if one)
    assert pairs == int(found.costs["attended"][KS.index(k), 0])


def test_differences_are_paired(found: ProgressiveIcl) -> None:
    frame = found.to_frame().set_index(["task", "variant", "k"])
    for task in ("XOR", "OR", ALL):
        scores, few = found.scores["random"][1], found.few_shot
        if task != ALL:
            scores, few = scores.of(task), few.of(task)
        apart = scores.correct.double() - few.correct.double()
        row = frame.loc[task, "random", 1]
        assert row.difference == pytest.approx(float(apart.mean()))
        ends = row.difference_low, row.difference_high
        assert ends == pytest.approx(paired_interval(apart))
        assert row.whole == 0 and frame.whole[task, "random", 5] == 1
        assert row.kept == (row.difference_low > -0.1) and row.n_distinct == len(apart)
    table = found.table()
    assert table.loc[(ALL, "task vector"), 0] == found.scores["task vector"][0].accuracy
    assert table.few_shot[ALL, "random"] == found.few_shot.accuracy
    # Of 10 equal pairs the interval reaches below -0.1, so that nothing is kept.
    assert not frame.kept.any() and found.first_kept().k.isna().all()
    assert "all of them" in repr(found) and "<table" in found._repr_html_()


def test_the_first_k_that_is_kept_stays_kept(toy: Any, toy_vectors: tv.TaskVectors) -> None:
    episodes = tv.sample_episodes(tv.find_tasks(["XOR"]), 60, 4, seed=1)
    found = progressive_icl(toy, episodes, vectors=toy_vectors, layer=1, ks=KS)
    kept = found.first_kept().set_index("variant")
    frame = found.to_frame()
    assert kept.k["task vector"] == 0 and kept.k["random"] == 5
    for name, at in kept.k.items():
        own = frame[frame.variant == name].set_index("k")
        assert own.kept[own.index >= at].all() and (
            at == 0 or not own.kept[own.index < at].iloc[-1]
        )
        assert (
            own.tokens_ratio[at]
            == kept.tokens_ratio[name]
            == own.tokens[at] / float(found.few_shot_costs["tokens"].double().mean())
        )


def test_the_figure_shows_the_differences(found: ProgressiveIcl) -> None:
    ax = plot_progressive(found, task="XOR")
    frame = found.to_frame()
    own = frame[(frame.task == "XOR") & (frame.variant == "task vector")]
    lines = {str(line.get_label()): line for line in ax.lines}
    assert list(lines["task vector"].get_ydata()) == own.difference.tolist()
    assert list(lines["task vector"].get_xdata()) == list(KS)
    assert plot_progressive(found).get_title().startswith("All tasks")
    with pytest.raises(ValueError, match="no task 'AND'"):
        plot_progressive(found, task="AND")
    plt.close("all")


def test_a_separator_or_several_positions_move_with_the_prompt(
    toy: Any, sets: dict[str, list[tv.Episode]], toy_vectors: tv.TaskVectors
) -> None:
    variants = [
        lambda task, at=at: [[tv.inject(toy_vectors[task, 1], 1, position=at)]]
        for at in (-1, Separator(-1), [-1])
    ]
    texts = [
        progressive_generate(toy, sets["test"][:4], one, k=2, max_new_tokens=5) for one in variants
    ]
    assert texts[0] == texts[1] == texts[2]
    elsewhere = [[tv.inject(toy_vectors["OR", 1], 1, position=(-2, 0))]]
    assert progressive_generate(toy, sets["test"][:4], elsewhere, k=2, max_new_tokens=5) != texts[0]


def test_what_cannot_be_done_is_refused(toy: Any, sets: dict[str, list[tv.Episode]]) -> None:
    with pytest.raises(ValueError, match=r"ks is \[-1\]"):
        progressive_icl(toy, sets["test"], ks=[-1])
    with pytest.raises(ValueError, match="k is 6 and max_new_tokens 5"):
        progressive_generate(toy, sets["test"], k=6, max_new_tokens=5)
    with pytest.raises(ValueError, match="has no demonstrations"):
        progressive_generate(toy, tv.zero_shot(sets["test"]), k=1, max_new_tokens=5)


@pytest.mark.parametrize("position", [-1, None])
def test_texts_agree_with_accuracies_for_interventions_that_the_model_carries(
    position: int | None,
) -> None:
    toy = tv.load_model("toy")
    episodes = tv.sample_episodes(tv.find_tasks(["XOR", "OR"]), 8, 4, seed=0)
    vectors = tv.task_vectors(tv.collect(toy, episodes))
    edits = vectors.inject("OR", 1, position=position, scale=0.7)
    with toy.hooks(fwd_hooks=list(edits)):
        found = progressive_icl(toy, episodes, ks=[1])
        [texts] = progressive_generate(toy, episodes, k=1, max_new_tokens=5)
    right = [text == one.answer for text, one in zip(texts, episodes, strict=True)]
    assert found.scores["zero-shot"][0].correct.tolist() == right
    assert not all(right)
