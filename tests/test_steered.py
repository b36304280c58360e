"""Steering at several strengths: its texts and numbers against plain passes, and its verdict."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import planted
import pytest
import torch

import transformer_lens_taskvec as tv
from transformer_lens_taskvec.analysis.steered import Steering, repetition, steer
from transformer_lens_taskvec.vectors.contrast import contrast_vectors

PROMPTS = ["example:01011 11010->", "example:1<2 & 3"]


@pytest.fixture(scope="module")
def toy() -> Any:
    return tv.load_model("toy")


@pytest.fixture(scope="module")
def contrast(toy: Any) -> tv.TaskVectors:
    episodes = tv.sample_episodes(tv.find_tasks(["XOR", "OR"]), 8, 4, seed=0)
    return contrast_vectors(toy, episodes)


@pytest.fixture(scope="module")
def steering(toy: Any, contrast: tv.TaskVectors) -> Steering:
    return steer(
        toy,
        PROMPTS,
        contrast,
        1,
        task="XOR",
        scales=(2.0, 0.5),
        max_new_tokens=12,
        temperature=1.0,
        seed=4,
        score=lambda text: text.count("1"),
    )


def test_texts_are_those_of_generation_with_the_same_edits(
    toy: Any, contrast: tv.TaskVectors, steering: Steering
) -> None:
    assert steering.scales == (0.0, 0.5, 2.0) and steering.control is not None
    control = tv.control_vectors(contrast, kinds=["random"], seed=4)["random"]
    for found, vectors in ((steering, contrast), (steering.control, control)):
        for scale, texts in zip(found.scales, found.texts, strict=True):
            edits = vectors.inject("XOR", 1, scale=scale, relative=True) if scale else []
            options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "seed": 4}
            assert list(texts) == tv.generate(toy, PROMPTS, edits, first=None, **options)
    assert steering.texts[2] != steering.texts[0] != steering.control.texts[2]
    assert steering.score is not None
    counts = [[text.count("1") for text in texts] for texts in steering.texts]
    assert steering.score.tolist() == counts


def test_perplexity_is_that_of_the_model_without_the_vector(
    toy: Any, contrast: tv.TaskVectors, steering: Steering
) -> None:
    for number, scale in enumerate(steering.scales):
        edits = contrast.inject("XOR", 1, scale=scale, relative=True) if scale else []
        found = tv.generate(
            toy,
            PROMPTS,
            edits,
            max_new_tokens=12,
            temperature=1.0,
            seed=4,
            first=None,
            scores=True,
        )
        for row, ids in enumerate(found.tokens):
            before = toy.tokenizer.encode(PROMPTS[row], add_special_tokens=False)
            with torch.no_grad():
                logits = toy.original_model(torch.tensor([[*before, *ids]])).logits[0]
            loss = torch.nn.functional.cross_entropy(
                logits[len(before) - 1 : -1], torch.tensor(ids)
            )
            torch.testing.assert_close(
                steering.perplexity[number, row], loss.exp(), atol=1e-4, rtol=1e-4
            )
            trigrams = [ids[start : start + 3] for start in range(len(ids) - 2)]
            new = sum(one not in trigrams[:place] for place, one in enumerate(trigrams))
            share = 1 - new / len(trigrams) if trigrams else 0.0
            assert float(steering.repetition[number, row]) == pytest.approx(share)
    assert repetition([7] * 10) == pytest.approx(1 - 1 / 8)


def test_text_breaks_down_beyond_the_bounds_and_the_largest_before_is_proposed(
    steering: Steering,
) -> None:
    made = replace(
        steering,
        scales=(0.0, 0.1, 0.2, 0.4, 0.8),
        texts=(("a", "b"),) * 5,
        perplexity=torch.tensor([[5.0, 2.0], [19, 7], [25, 7], [25, 9], [5, 2]]),
        repetition=torch.tensor([[0.0, 0.4], [0.2, 0.4], [0.0, 0.0], [0.0, 0.4], [0.0, 0.8]]),
        score=None,
        control=None,
        perplexity_bound=4.0,
        repetition_bound=0.3,
    )
    expected = [[False, False], [False, False], [True, False], [True, True], [False, True]]
    assert made.broken.tolist() == expected
    assert made.proposed == 0.1  # half of the texts break down at 0.2
    assert replace(made, perplexity_bound=100.0, repetition_bound=1.0).proposed == 0.8
    strict = replace(made, perplexity_bound=1.5)
    assert strict.proposed == 0.0 and "breaks down at 0.1 of" in repr(strict)
    assert "use up to 0.1 of the activation's norm)" in repr(made)
    assert repr(made).count("BREAKS DOWN") == 4
    assert "the largest tried" in repr(replace(made, perplexity_bound=100.0, repetition_bound=1.0))


class Text(HTMLParser):
    """The text of each cell, and what is bold."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.bold: list[str] = []
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self._open:
            self.cells[-1] += data
        if self._open[-1:] == ["b"]:
            self.bold.append(data)


def test_the_table_shows_every_continuation_next_to_the_random_directions(
    steering: Steering,
) -> None:
    frame = steering.to_frame()
    assert len(frame) == 6 and list(frame.scale[:3]) == [0.0, 0.5, 2.0]
    numbers = ["continuation", "perplexity", "repetition", "score", "breaks_down"]
    others = [f"random_{name}" for name in numbers]
    assert list(frame.columns) == ["prompt", "scale", *numbers, *others]
    table = Text(steering._repr_html_())
    shown = " ".join(table.cells)
    assert steering.control is not None
    for texts in (*steering.texts, *steering.control.texts):
        assert all(text.replace("\n", "\u21b5") in shown for text in texts)
    assert f"{steering.proposed:g}" in table.bold
    assert "1&lt;2 &amp; 3" in steering._repr_html_()
    assert table.bold.count("breaks down") == int(frame.breaks_down.sum()) + int(
        frame.random_breaks_down[frame.scale > 0].sum()
    )


def test_a_planted_vector_gives_its_tasks_answers_and_a_random_one_does_not() -> None:
    model, tasks = planted.planted(), planted.tasks()
    name = "shift 1"
    episodes = tv.sample_episodes({name: tasks[name]}, 6, 4, seed=0, template=planted.TEMPLATE)
    vectors = tv.task_vectors(tv.collect(model, episodes))
    right, random = 0.0, 0.0
    for episode in tv.zero_shot(episodes):
        found = steer(
            model,
            [episode],
            vectors,
            planted.WORKS[0],
            scales=(1.0,),
            relative=False,
            mode="replace",
            first=0,
            max_new_tokens=1,
            temperature=0.0,
            score=lambda text, answer=episode.answer: float(text.strip() == answer.strip()),
        )
        assert found.control is not None and found.score is not None
        assert found.score[0] == 0.0 and found.control.score is not None
        right += float(found.score[1])
        random += float(found.control.score[1])
    assert right == len(episodes) == 6 and random <= 3  # one answer in six is right by chance


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": None}, "name one"),
        ({"task": "AND"}, "no vector for 'AND'"),
        ({"scales": ()}, "give one strength or more"),
        ({"scales": (0.0,)}, "give one strength or more"),
        ({"scales": (-1.0, 1.0)}, "all of one sign"),
        ({"perplexity_bound": 1.0}, "perplexity_bound is 1.0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"layer": 9}, "layer 9 is not among"),
    ],
)
def test_requests_that_mean_nothing_are_refused(
    toy: Any, contrast: tv.TaskVectors, options: dict[str, Any], message: str
) -> None:
    layer = options.pop("layer", 1)
    with pytest.raises(ValueError, match=message):
        steer(toy, PROMPTS, contrast, layer, **{"task": "XOR", **options})


def test_what_the_model_carries_acts_as_in_generate() -> None:
    toy = tv.load_model("toy")
    episodes = tv.sample_episodes(tv.find_tasks(["XOR", "OR"]), 8, 4, seed=0)
    vectors = tv.task_vectors(tv.collect(toy, episodes))
    prompts = [one.prompt for one in tv.zero_shot(episodes)]
    options: dict[str, Any] = {"max_new_tokens": 5, "temperature": 0.0}
    with toy.hooks(fwd_hooks=list(vectors.inject("OR", 1))):
        found = steer(toy, prompts, vectors, 2, task="XOR", scales=(0.1,), control=False, **options)
        assert list(found.texts[0]) == tv.generate(toy, prompts, max_new_tokens=5)
