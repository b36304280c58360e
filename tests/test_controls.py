"""Controls are what they say, and a sweep reports them beside the task vectors."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch

import transformer_lens_taskvec as tv
from transformer_lens_taskvec.prompts import shuffle_labels

OPERATORS = tv.bitwise_tasks(null=False)


@pytest.fixture(scope="module")
def toy() -> Any:
    return tv.load_model("toy", device="cpu")


@pytest.fixture(scope="module")
def episodes() -> list[tv.Episode]:
    return tv.sample_episodes(OPERATORS, 20, 8, seed=1)


@pytest.fixture(scope="module")
def vectors(toy: Any, episodes: list[tv.Episode]) -> tv.TaskVectors:
    return tv.task_vectors(tv.collect(toy, episodes))


@pytest.fixture(scope="module")
def made(
    toy: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors
) -> dict[str, tv.TaskVectors]:
    return tv.control_vectors(vectors, toy, episodes, seed=3)


def test_controls_are_as_long_as_the_vectors(
    made: dict[str, tv.TaskVectors], vectors: tv.TaskVectors
) -> None:
    lengths = vectors.values.norm(dim=-1)
    for kind in ("random", "reinitialised"):
        torch.testing.assert_close(made[kind].values.norm(dim=-1), lengths)
        cosine = torch.nn.functional.cosine_similarity(made[kind].values, vectors.values, dim=-1)
        assert cosine.abs().mean() < 0.5
    torch.testing.assert_close(made["other task"]["NAND"], vectors["AND"])
    torch.testing.assert_close(made["mean"]["XOR"], vectors.values.mean(dim=0))


def test_controls_from_prompts_are_the_means_of_those(
    toy: Any,
    episodes: list[tv.Episode],
    made: dict[str, tv.TaskVectors],
) -> None:
    for kind, some in {
        "shuffled labels": shuffle_labels(episodes, 3),
        "zero-shot": tv.zero_shot(episodes),
    }.items():
        expected = tv.task_vectors(tv.collect(toy, some))
        torch.testing.assert_close(made[kind].values, expected.values)


def test_no_control_does_what_the_vectors_do(
    toy: Any, vectors: tv.TaskVectors, made: dict[str, tv.TaskVectors]
) -> None:
    queries = tv.zero_shot(tv.sample_episodes(OPERATORS, 15, 8, seed=2))
    sweep = tv.layer_sweep(toy, queries, vectors, controls=made)
    assert set(sweep.controls) == set(made)
    best = vectors.layers.index(sweep.best_layer())
    assert sweep.accuracy[best].mean() > 0.9
    for kind, control in sweep.controls.items():
        assert control.accuracy[best].mean() < 0.5, kind
        alone = tv.layer_sweep(toy, queries, made[kind])
        assert torch.equal(alone.correct, control.correct)
    frame = sweep.to_frame()
    assert "control: random" in frame and len(frame) == 4 * 6
    assert torch.equal(tv.layer_sweep(toy, queries, vectors).correct, sweep.correct)
    quick = tv.layer_sweep(toy, queries[:12], vectors, controls=True)
    assert set(quick.controls) == {"random", "other task", "mean"}
    plt.close(tv.plot_layer_sweep(sweep).figure)


def test_a_model_is_left_as_it_was(
    toy: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors
) -> None:
    before = [parameter.clone() for parameter in toy.parameters()]
    tv.control_vectors(vectors, toy, episodes[:20] + episodes[20:], kinds=["reinitialised"])
    assert all(map(torch.equal, before, toy.parameters()))


def test_what_cannot_be_made_is_said(vectors: tv.TaskVectors) -> None:
    with pytest.raises(ValueError, match="no control 'noise'"):
        tv.control_vectors(vectors, kinds=["noise"])
    with pytest.raises(ValueError, match="needs model= and episodes="):
        tv.control_vectors(vectors, kinds=["zero-shot"])
    one = tv.TaskVectors(vectors.values[:1], ("AND",), vectors.layers, vectors.source)
    with pytest.raises(ValueError, match="one task only"):
        tv.control_vectors(one)
    assert set(tv.control_vectors(one, kinds=["random"])) == {"random"}


def test_prompts_too_short_for_a_control_go_without_it(toy: Any) -> None:
    one = tv.sample_episodes(OPERATORS, 3, 1, seed=0)
    vectors = tv.task_vectors(tv.collect(toy, one))
    assert "shuffled labels" not in tv.control_vectors(vectors, toy, one)
    assert set(tv.control_vectors(vectors, toy, tv.zero_shot(one))) == {
        "random",
        "other task",
        "mean",
        "reinitialised",
    }
