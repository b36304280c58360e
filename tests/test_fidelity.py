"""Distances from the few-shot model, token by token, against plain passes and numpy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import planted
import pytest
import torch
from scipy.stats import rankdata

import transformer_lens_taskvec as tv
from transformer_lens_taskvec.analysis import forced as forced_module
from transformer_lens_taskvec.analysis.fidelity import IclFidelity, few_shot_answers, icl_fidelity
from transformer_lens_taskvec.plots.fidelity import plot_fidelity

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*distinct inputs", "ignore:.*one intervention at a time"
)


@pytest.fixture(scope="module")
def toy() -> Any:
    return tv.load_model("toy")


@pytest.fixture(scope="module")
def sets() -> dict[str, list[tv.Episode]]:
    tasks = tv.find_tasks(["XOR", "OR"])
    return tv.sample_splits(tasks, {"train": 12, "test": 8}, n_shots=4, seed=0)


@pytest.fixture(scope="module")
def toy_vectors(toy: Any, sets: dict[str, list[tv.Episode]]) -> tv.TaskVectors:
    return tv.task_vectors(tv.collect(toy, sets["train"]))


def softmax_by_hand(
    model: Any, prompt: str, said: list[int], vector: torch.Tensor | None, layer: int = 0
) -> np.ndarray:
    """``[pos, vocab]`` probabilities of one unpadded pass, a vector put at the prompt's end."""
    ids = model.tokenizer.encode(prompt, add_special_tokens=False)
    at = len(ids) - 1

    def put(resid: torch.Tensor, hook: Any) -> torch.Tensor:
        edited = resid.clone()
        edited[:, at] = vector
        return edited

    hooks = [] if vector is None else [(f"blocks.{layer}.hook_resid_post", put)]
    with torch.no_grad():
        logits = model.run_with_hooks(torch.tensor([ids + said]), fwd_hooks=hooks)
    found = logits[0, at : at + len(said)].double().numpy()
    weights = np.exp(found - found.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def by_hand(few: np.ndarray, here: np.ndarray, said: list[int]) -> dict[str, np.ndarray]:
    rows = range(len(said))
    return {
        "kl": (few * np.log(few / here)).sum(axis=-1),
        "tv": 1 - np.minimum(few, here).sum(axis=-1),
        "discrepancy": np.abs(few[rows, said] - here[rows, said]),
    }


@pytest.mark.model
def test_distances_are_those_of_plain_passes(
    model: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors
) -> None:
    """Answers of different lengths, in padded batches of a small random model."""
    few_shot = episodes[::2]
    layer = vectors.layers[1]
    found = icl_fidelity(model, few_shot, vectors=vectors, layers=[layer])
    for row, episode in enumerate(few_shot):
        said = model.tokenizer.encode(episode.answer, add_special_tokens=False)
        assert found.lengths[row] == len(said)
        few = softmax_by_hand(model, episode.prompt, said, None)
        [zero] = tv.zero_shot([episode])
        for name, vector in (("zero-shot", None), ("task vector", vectors[episode.task, layer])):
            index = found.index(name, None if vector is None else layer)
            here = softmax_by_hand(model, zero.prompt, said, vector, layer)
            for distance, expected in by_hand(few, here, said).items():
                values = found.distances[distance][index, row]
                np.testing.assert_allclose(values[: len(said)], expected, atol=2e-5, rtol=1e-3)
                assert values[len(said) :].isnan().all()
    assert len(set(found.lengths.tolist())) > 1


def test_scores_are_those_of_evaluate(
    toy: Any, sets: dict[str, list[tv.Episode]], toy_vectors: tv.TaskVectors
) -> None:
    found = icl_fidelity(toy, sets["test"], vectors=toy_vectors, layers=[1], stop="separator")
    zero = tv.zero_shot(sets["test"])
    few = tv.evaluate(toy, sets["test"], stop="separator")
    torch.testing.assert_close(found.few_shot.loss, few.loss)
    assert found.few_shot.correct.equal(few.correct) and found.few_shot.size == few.size
    expected = tv.evaluate_many(
        toy, zero, lambda task: [[], toy_vectors.inject(task, 1)], stop="separator"
    )
    for own, other in zip(found.scores, expected, strict=False):
        assert own.correct.equal(other.correct) and own.stop == "separator"
        torch.testing.assert_close(own.loss, other.loss)
    greedy = icl_fidelity(
        toy, sets["test"], vectors=toy_vectors, layers=[1], forced="greedy", stop="separator"
    )
    assert [one.accuracy for one in greedy.scores] == [one.accuracy for one in found.scores]


def test_the_first_position_is_the_divergence_of_the_benchmark(
    toy: Any, sets: dict[str, list[tv.Episode]]
) -> None:
    found = icl_fidelity(toy, sets["test"])
    _, divergence = few_shot_answers(toy, sets["test"])
    zero = tv.evaluate(toy, tv.zero_shot(sets["test"]), metrics=[divergence])
    torch.testing.assert_close(found.distances["kl"][0, :, 0], zero.metrics["divergence"])


def test_greedy_and_sampled_continuations_are_the_few_shot_models_own(
    toy: Any, sets: dict[str, list[tv.Episode]]
) -> None:
    few_shot = sets["test"][:4]
    found = icl_fidelity(toy, few_shot, forced="greedy", n_tokens=7)
    for row, episode in enumerate(few_shot):
        ids = toy.tokenizer.encode(episode.prompt, add_special_tokens=False)
        said: list[int] = []
        while len(said) < 7 and (not said or toy.tokenizer.decode(said[-1:]) != "\n"):
            with torch.no_grad():
                said.append(int(toy(torch.tensor([ids + said]))[0, -1].argmax()))
        [zero] = tv.zero_shot([episode])
        few, here = (softmax_by_hand(toy, one.prompt, said, None) for one in (episode, zero))
        assert found.lengths[row] == len(said)
        expected = by_hand(few, here, said)["tv"]
        np.testing.assert_allclose(
            found.distances["tv"][0, row, : len(said)], expected, atol=1e-5, rtol=1e-4
        )
    one, same, other = (
        icl_fidelity(toy, few_shot, forced="sampled", seed=seed).lengths.tolist()
        for seed in (1, 1, 2)
    )
    assert one == same and len(one) == len(other)


@pytest.mark.model
def test_a_perfect_vector_is_at_distance_zero() -> None:
    """The planted model's last layer adds nothing: its few-shot state there says everything."""
    model = planted.planted()
    episodes = tv.sample_episodes(planted.tasks(), 5, 4, seed=1, template=planted.TEMPLATE)
    states = tv.collect(model, episodes)
    vectors = tv.task_vectors(states)
    working = icl_fidelity(model, episodes, vectors=vectors, layers=planted.WORKS)
    for layer in planted.WORKS:
        assert working.distances["kl"][working.index("task vector", layer)].max() < 1e-3
        others = working.distances["tv"][working.index("other task", layer)]
        assert others.min() > 0.99
    assert working.distances["tv"][0].min() > 0.9
    last = planted.N_LAYERS - 1
    for row, episode in enumerate(episodes):
        own = {"own state": [tv.inject(states.values[row, last], last)]}
        found = icl_fidelity(model, [episode], own)
        for name, values in found.distances.items():
            assert values[1].max() < 1e-6, name


def test_portions_give_the_same(
    toy: Any,
    sets: dict[str, list[tv.Episode]],
    toy_vectors: tv.TaskVectors,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = icl_fidelity(toy, sets["test"], vectors=toy_vectors, layers=[1])
    held: list[int] = []
    portions = forced_module._portions

    def counted(*args: Any) -> Any:
        for some in portions(*args):
            held.append(len(some))
            yield some

    monkeypatch.setattr(forced_module, "_HELD", 3 * 5 * int(toy.cfg.d_vocab))
    monkeypatch.setattr(forced_module, "_portions", counted)
    parts = icl_fidelity(toy, sets["test"], vectors=toy_vectors, layers=[1])
    assert max(held) <= 3 and sum(held) == len(sets["test"])
    for name, values in whole.distances.items():
        torch.testing.assert_close(values, parts.distances[name], atol=1e-5, rtol=1e-4)


def test_tables_average_over_queries(
    toy: Any, sets: dict[str, list[tv.Episode]], toy_vectors: tv.TaskVectors
) -> None:
    """A query with three episodes counts once."""
    some = [
        *sets["test"],
        *(replace(sets["test"][0], demos=one.demos) for one in sets["test"][1:3]),
    ]
    found = icl_fidelity(toy, some, vectors=toy_vectors, layers=[1, 2])
    frame = found.to_frame()
    row = frame[(frame.task == "XOR") & (frame.variant == "zero-shot") & (frame.position == 0)]
    values = found.distances["tv"][0, :, 0].tolist()
    expected = (sum((values[0], *values[8 + 8 :])) / 3 + sum(values[1:8])) / 8
    assert row.tv.item() == pytest.approx(expected) and row.kept.item() == 1 - row.tv.item()
    assert row.n_distinct.item() == 8 and row.tv_low.item() < expected < row.tv_high.item()
    summary = found.summary()
    correlation = found.correlation("tv").set_index("over")
    ranks = [rankdata(summary[name]) for name in ("tv", "accuracy")]
    assert correlation.spearman["all"] == pytest.approx(np.corrcoef(ranks)[0, 1])
    assert correlation.n.tolist() == [18, 9, 9] and correlation.spearman["all"] < -0.5
    assert found.closest() == 1
    assert "task vector KL" in repr(found) and "<table" in found._repr_html_()


def test_the_figure_shows_what_the_table_says(
    toy: Any, sets: dict[str, list[tv.Episode]], toy_vectors: tv.TaskVectors
) -> None:
    found = icl_fidelity(toy, sets["test"], vectors=toy_vectors)
    ax = plot_fidelity(found, distance="tv", task="XOR")
    lines = {str(line.get_label()): line.get_ydata() for line in ax.lines}
    curve = found.curve("task vector", 1, distance="tv", task="XOR")
    np.testing.assert_allclose(lines["task vector"], curve["mean"])
    assert "layer 1" in ax.get_title() and len(lines) == 5
    with pytest.raises(ValueError, match="layer is 9; there are"):
        plot_fidelity(found, layer=9)
    plt.close("all")


def test_what_cannot_be_compared_is_refused(
    toy: Any, sets: dict[str, list[tv.Episode]], toy_vectors: tv.TaskVectors
) -> None:
    few_shot = sets["test"]
    with pytest.raises(ValueError, match="few_shot is empty"):
        icl_fidelity(toy, [])
    with pytest.raises(ValueError, match="has no demonstrations"):
        icl_fidelity(toy, tv.zero_shot(few_shot))
    with pytest.raises(ValueError, match="forced is 'true'; there are: answer, greedy, sampled"):
        icl_fidelity(toy, few_shot, forced="true")
    with pytest.raises(ValueError, match="n_tokens is 0"):
        icl_fidelity(toy, few_shot, forced="greedy", n_tokens=0)
    with pytest.raises(ValueError, match="two variants are called 'zero-shot'"):
        icl_fidelity(toy, few_shot, {"zero-shot": []})
    with pytest.raises(ValueError, match="two variants are called 'random'"):
        icl_fidelity(toy, few_shot, {"random": []}, vectors=toy_vectors)
    with pytest.raises(ValueError, match="there are no vectors"):
        icl_fidelity(toy, few_shot, layers=[1])
    found: IclFidelity = icl_fidelity(toy, few_shot[:2])
    with pytest.raises(ValueError, match="no variant 'task vector' at layer 1"):
        found.curve("task vector", 1)
    with pytest.raises(ValueError, match="no vectors were injected"):
        found.closest()
