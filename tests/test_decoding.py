"""Sensitivity to decoding, against probabilities by hand and answers that are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import transformer_lens_taskvec as tv
from transformer_lens_taskvec.analysis import decoding
from transformer_lens_taskvec.analysis.decoding import decoding_sensitivity


@pytest.fixture(scope="module")
def toy() -> Any:
    return tv.load_model("toy")


def test_accuracy_under_sampling_is_the_answers_probability(toy: Any) -> None:
    """The first token alone, at temperature 2: exact probabilities and 200 samples of each."""
    episodes = tv.sample_episodes(tv.find_tasks(["XOR"]), 6, 2, seed=0)
    task = tv.mapping_task("first", {e.query.x: e.query.y[0] for e in episodes})
    zero = tv.zero_shot(tv.sample_episodes([task], 6, 1, seed=0))
    expected = []
    for episode in zero:
        ids = toy.tokenizer.encode(episode.prompt, add_special_tokens=False)
        answer = toy.tokenizer.encode(episode.answer, add_special_tokens=False)
        with torch.no_grad():
            chances = (toy(torch.tensor([ids]))[0, -1] / 2).softmax(-1)
        assert len(answer) == 1
        expected.append(float(chances[answer[0]]))
    settings = {"greedy": {}, "hot": {"temperature": 2.0}}
    found = decoding_sensitivity(toy, zero, decodings=settings, n_samples=200)
    for row, share in enumerate(expected):
        assert float(found.single[0, 1, row]) == pytest.approx(share, abs=0.13)
    assert float(found.single[0, 1].mean()) == pytest.approx(sum(expected) / 6, abs=0.05)
    greedy = tv.evaluate(toy, zero)
    assert found.single[0, 0].bool().equal(greedy.correct) and found.n_samples == (1, 200)
    again = decoding_sensitivity(toy, zero, decodings=settings, n_samples=200)
    assert again.single.equal(found.single)


@pytest.mark.parametrize("stop", [None, "separator"])
def test_greedy_is_the_accuracy_that_evaluate_gives(toy: Any, stop: str | None) -> None:
    episodes = tv.sample_episodes(tv.find_tasks(["XOR", "OR"]), 8, 4, seed=0)
    vectors, zero = tv.task_vectors(tv.collect(toy, episodes)), tv.zero_shot(episodes)
    edits = vectors.inject("XOR", 1, scale=0.8)
    decodings: dict[str, Any] = {"greedy": {}}
    found = decoding_sensitivity(toy, zero, {"own": edits}, decodings=decodings, stop=stop)
    scores = tv.evaluate(toy, zero, edits, stop=stop)
    assert found.single[1, 0].bool().equal(scores.correct) and 0 < scores.accuracy < 1


def test_votes_spread_and_settings(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    episodes = tv.zero_shot(tv.sample_episodes(tv.find_tasks(["XOR"]), 4, 1, seed=0))
    given: list[dict[str, Any]] = []

    def said(model: Any, prompts: Any, interventions: Any, **options: Any) -> list[str]:
        given.append(options)
        right = [one.answer for one in prompts]
        if "temperature" not in options:
            return right
        # Three of five right; then two of five, of which the others are all different.
        mixed = [[True, False, True, False, True], [False, True, False, True, False]]
        return [
            (f" {text} " if mixed[index // 5 % 2][index % 5] else f"wrong {index}")
            for index, text in enumerate(right)
        ]

    monkeypatch.setattr(decoding, "answers", said)
    settings = {"greedy": {}, "warm": {"temperature": 0.7, "seed": 4}}
    found = decoding_sensitivity(toy, episodes, decodings=settings, n_samples=5, seed=3)
    assert found.single[0].mean(dim=-1).tolist() == pytest.approx([1, 0.5])
    assert found.vote[0, 1].tolist() == [1, 1, 1, 1]
    assert found.agreement[0, 1].tolist() == pytest.approx([0.6, 0.4, 0.6, 0.4])
    assert given[0]["seed"] == 3 and given[1]["seed"] == 4
    with pytest.raises(ValueError, match="decoding 's' has stop; give temperature or config"):
        decoding_sensitivity(toy, episodes, decodings={"s": {"stop": "x"}})
    assert given[0]["max_new_tokens"] == 5 and given[0]["stop"] is None
    decoding_sensitivity(toy, episodes, decodings={"greedy": {}}, stop="separator")
    assert given[-1]["max_new_tokens"] == 6 and given[-1]["stop"] == "\n"
    with pytest.raises(ValueError, match="max_new_tokens is 9, and without a separator"):
        decoding_sensitivity(toy, episodes, max_new_tokens=9)
    [row] = found.spread().to_dict("records")
    assert row["best"] == "greedy" and row["worst"] == "warm"
    assert row["spread"] == pytest.approx(0.5)
    frame = found.to_frame()
    assert frame.vote.tolist() == [1, 1] and frame.n_distinct.tolist() == [4, 4]
    assert (frame.single_low <= frame.single).all() and (frame.single <= frame.single_high).all()
    assert "greedy" in repr(found) and "<table" in found._repr_html_()


def test_what_cannot_be_done_is_refused(toy: Any) -> None:
    episodes = tv.sample_episodes(tv.find_tasks(["XOR"]), 2, 1, seed=0)
    with pytest.raises(ValueError, match="0 decodings"):
        decoding_sensitivity(toy, episodes, decodings={})
    with pytest.raises(ValueError, match="0 samples"):
        decoding_sensitivity(toy, episodes, n_samples=0)
    found = decoding_sensitivity(toy, episodes, decodings={"greedy": {}})
    with pytest.raises(ValueError, match="kind is 'votes'; there are: single, vote"):
        found.spread("votes")
    with pytest.raises(ValueError, match="task is 'OR'; there are: XOR"):
        found.to_frame("OR")
